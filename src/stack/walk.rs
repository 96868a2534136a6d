//! A stack by its frame pointers.

use super::load::word;

/// Frames further apart than this are none: no function of ours has locals of a megabyte.
const MOST_BETWEEN: usize = 1 << 20;

/// Where a thread is: the registers that a walk starts from.
#[derive(Clone, Copy)]
pub struct Registers {
    /// The instruction.
    pub counter: usize,
    /// The frame pointer, or whatever the code keeps in its register.
    pub frame: usize,
    /// The lowest address of the stack in use.
    pub stack: usize,
}

/// Writes the addresses of the stack into `frames`, the innermost first, and gives their number. The first is the
/// instruction itself, the others are return addresses. Ends where the chain does not go on upwards. Needs
/// [`install`](super::load::install); may be called in a signal handler.
pub fn walk(from: Registers, frames: &mut [usize]) -> usize {
    let mut length = 0;
    let mut push = |address| {
        let Some(place) = frames.get_mut(length) else { return false };
        *place = address;
        length += 1;
        true
    };
    if !push(from.counter) {
        return length;
    }
    let (mut frame, mut lowest) = (from.frame, from.stack);
    loop {
        if frame < lowest || frame - lowest > MOST_BETWEEN || frame % size_of::<usize>() != 0 {
            break;
        }
        let (Some(next), Some(back)) = (word(frame), word(frame + size_of::<usize>())) else { break };
        if back == 0 || !push(back) {
            break;
        }
        lowest = frame + 2 * size_of::<usize>();
        frame = next;
    }
    length
}

/// The stack of the caller: return addresses only, its own caller's first.
#[inline(never)]
pub fn here(frames: &mut [usize]) -> usize {
    let (frame, stack): (usize, usize);
    // SAFETY: both registers are read and nothing else is done.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!("mov {}, rbp", "mov {}, rsp", out(reg) frame, out(reg) stack, options(nomem, nostack, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("mov {}, x29", "mov {}, sp", out(reg) frame, out(reg) stack, options(nomem, nostack, preserves_flags));
    }
    // The counter would be in this function, which nobody wants to see.
    let mut length = walk(Registers { counter: 0, frame, stack }, frames);
    if length > 0 {
        frames.copy_within(1..length, 0);
        length -= 1;
    }
    length
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    /// Its own address range, by the return addresses into it.
    #[inline(never)]
    fn deep(levels: usize, frames: &mut [usize]) -> usize {
        let length = if levels == 0 { here(frames) } else { deep(levels - 1, frames) };
        black_box(length)
    }

    #[test]
    fn each_level_of_a_recursion_is_a_frame() {
        crate::stack::install().unwrap();
        let mut frames = [0; 256];
        let [flat, deeper] = [0, 50].map(|levels| deep(levels, &mut frames));
        assert_eq!(deeper, flat + 50);
        let again = frames[1];
        assert_eq!(frames[1..50], [again; 49], "the same call each time");
    }

    #[test]
    fn what_does_not_fit_is_cut_off() {
        crate::stack::install().unwrap();
        let mut few = [0; 8];
        assert_eq!(deep(50, &mut few), 7);
        assert_eq!(walk(Registers { counter: 1, frame: 0, stack: 0 }, &mut []), 0);
    }

    #[test]
    fn no_frame_pointer_leads_astray() {
        crate::stack::install().unwrap();
        let here = 0_usize;
        let stack = &raw const here as usize;
        let mut frames = [0; 256];
        for frame in [0, 1, stack + 1, stack + (64 << 20), usize::MAX, usize::MAX - 7, 0x1000, stack & !4095] {
            let length = walk(Registers { counter: 7, frame, stack }, &mut frames);
            assert!((1..=256).contains(&length), "{frame:#x}");
            assert_eq!(frames[0], 7);
        }
    }
}
