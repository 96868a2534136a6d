//! How the allocator takes the stack of a sample: its `prof_backtrace` hook.
//!
//! The hook follows frame pointers, which costs a tenth of unwinding by tables, and takes no lock; and it ends the stack with
//! one more frame that says whose work the thread does ([`mark`]). To the allocator that is a stack like any other, so it
//! keeps live and freed memory of each kind apart by itself, whoever frees it. No code is at such an address; the reader of the
//! dump makes labels of it.
//!
//! The hook is called inside the allocator: it must neither allocate nor lock nor panic. It is an experimental part
//! of jemalloc, so it is tried at the start, and without it there are profiles all the same.

use std::ffi::{c_uint, c_void};
use std::hint::black_box;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{ptr, slice};

use anyhow::Context as _;
use tikv_jemalloc_ctl::raw;

use crate::stack;
use crate::task::cost;
use crate::task::mark::{self, Mark};

const HOOK: &[u8] = b"experimental.hooks.prof_backtrace\0";

/// The address of the first mark. The lowest 64 KiB are never mapped, so nothing else can be there.
const MARKS: usize = 0x1000;

/// The allocator's type for it: places for addresses, the number that was written, how many fit.
type Backtrace = unsafe extern "C" fn(*mut *mut c_void, *mut c_uint, c_uint);

/// What the allocator would use by itself, for programs without frame pointers.
static UNWINDER: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// How samples get their stacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stacks {
    /// By frame pointers.
    FramePointers,
    /// By the allocator's own unwinder, because this program was built without frame pointers.
    Unwinder,
}

/// Gives the allocator our hook. Samples that were taken before are nobody's, which is the service's.
pub(super) fn install() -> anyhow::Result<Stacks> {
    stack::learn();
    // SAFETY: the control's value is a pointer to such a function, never null.
    let former: Backtrace = unsafe { raw::read(HOOK) }.context("the allocator has no hook for stacks")?;
    let way = if has_frame_pointers() { Stacks::FramePointers } else { Stacks::Unwinder };
    let hook: Backtrace = match way {
        Stacks::FramePointers => by_frame_pointers,
        Stacks::Unwinder => by_unwinder,
    };
    if former as usize != by_frame_pointers as *const () as usize
        && former as usize != by_unwinder as *const () as usize
    {
        UNWINDER.store(former as *mut c_void, Ordering::Release);
    }
    // SAFETY: the function is of the type that the control takes, and stays.
    unsafe { raw::write(HOOK, hook) }.context("the allocator does not take a hook for stacks")?;
    Ok(way)
}

/// The mark that an address of a dump stands for, if it is no address of code.
pub(super) fn mark_at(address: usize) -> Option<Mark> {
    let index = address.checked_sub(MARKS)?;
    (index < Mark::COUNT).then(|| Mark::from_index(index))
}

unsafe extern "C" fn by_frame_pointers(places: *mut *mut c_void, length: *mut c_uint, most: c_uint) {
    // SAFETY: the allocator hands `most` places, at least one, and a number to set.
    cost::heap_sample(|| unsafe {
        let places = slice::from_raw_parts_mut(places.cast::<usize>(), most as usize);
        let Some((last, frames)) = places.split_last_mut() else { return };
        let found = stack::own(frames);
        // Where it is cut off, its outermost frames are missing and the mark is not.
        let end = frames.get_mut(found).unwrap_or(last);
        *end = MARKS + mark::current().index();
        *length = found as c_uint + 1;
    });
}

unsafe extern "C" fn by_unwinder(places: *mut *mut c_void, length: *mut c_uint, most: c_uint) {
    // SAFETY: as above; the pointer was put there from a function of this type, before this one was made the hook.
    cost::heap_sample(|| unsafe {
        if most == 0 {
            return;
        }
        *length = 0;
        // With no room for a frame it would write one all the same.
        if most > 1 {
            let unwind: Backtrace = std::mem::transmute(UNWINDER.load(Ordering::Acquire));
            unwind(places, length, most - 1);
        }
        *places.add(*length as usize) = ptr::without_provenance_mut(MARKS + mark::current().index());
        *length += 1;
    });
}

/// Whether code of this program keeps frame pointers: a recursion ten levels deeper has ten frames more.
fn has_frame_pointers() -> bool {
    #[inline(never)]
    fn deep(levels: usize, frames: &mut [usize]) -> usize {
        let length = if levels == 0 { stack::own(frames) } else { deep(levels - 1, frames) };
        // Something to do after the call, so that it is one and no jump.
        black_box(length)
    }
    let mut frames = [0; 256];
    let flat = deep(0, &mut frames);
    flat > 1 && deep(10, &mut frames) == flat + 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::mark::{Kind, Stage};

    fn call(hook: Backtrace, most: usize) -> Vec<usize> {
        let (mut places, mut length) = (vec![ptr::null_mut(); most], 0);
        // SAFETY: as the allocator calls it.
        unsafe { hook(places.as_mut_ptr(), &mut length, most as c_uint) };
        places.truncate(length as usize);
        places.into_iter().map(|place| place as usize).collect()
    }

    #[test]
    fn both_ways_end_a_stack_with_the_mark() {
        assert_eq!(install().unwrap(), Stacks::FramePointers, "tests are built with frame pointers");
        let mark = Mark { kind: Kind::ValuationsRefresh, stage: Stage::Call };
        for hook in [by_frame_pointers as Backtrace, by_unwinder] {
            let (marked, plain) = (mark::under(mark, || call(hook, 128)), call(hook, 128));
            assert!(marked.len() > 4, "{marked:x?}");
            assert_eq!(marked.last().copied().and_then(mark_at), Some(mark));
            assert_eq!(plain.last().copied().and_then(mark_at), Some(Mark::NONE));
            assert!(marked[..marked.len() - 1].iter().all(|address| mark_at(*address).is_none()));
            // Cut off, with the mark all the same.
            assert_eq!(mark::under(mark, || call(hook, 3)).last().copied().and_then(mark_at), Some(mark));
            assert_eq!(mark::under(mark, || call(hook, 1)).last().copied().and_then(mark_at), Some(mark));
        }
    }

    /// Nanoseconds that a stack takes, `levels` deeper than here; the best of some rounds.
    #[inline(never)]
    fn nanoseconds(hook: Backtrace, levels: usize) -> u128 {
        if levels > 0 {
            return black_box(nanoseconds(hook, levels - 1));
        }
        const CALLS: u32 = 500;
        let (mut places, mut length) = ([ptr::null_mut(); 128], 0);
        let mut round = || {
            let begin = std::time::Instant::now();
            for _ in 0..CALLS {
                // SAFETY: as the allocator calls it.
                unsafe { hook(places.as_mut_ptr(), &mut length, 128) };
            }
            begin.elapsed().as_nanos() / u128::from(CALLS)
        };
        std::iter::repeat_with(&mut round).take(10).min().unwrap()
    }

    #[test]
    fn frame_pointers_are_much_cheaper_than_the_unwinder() {
        install().unwrap();
        for levels in [0, 40] {
            let [ours, unwinder] = [by_frame_pointers as Backtrace, by_unwinder].map(|hook| nanoseconds(hook, levels));
            println!("{levels} levels deeper: {ours} ns by frame pointers, {unwinder} ns by the unwinder");
            assert!(ours * 2 < unwinder, "{ours} ns by frame pointers, {unwinder} ns by the unwinder");
        }
    }

    #[test]
    fn addresses_of_code_are_no_marks() {
        for address in [0, 1, MARKS - 1, MARKS + Mark::COUNT, 0x10000, call as *const () as usize, usize::MAX] {
            assert_eq!(mark_at(address), None, "{address:#x}");
        }
    }
}
