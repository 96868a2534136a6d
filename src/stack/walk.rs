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
