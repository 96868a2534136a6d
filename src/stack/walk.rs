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

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(walk(Registers { counter: 7, frame: stack, stack }, &mut []), 0);
    }
}
