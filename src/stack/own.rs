//! A stack by its frame pointers, read only where the thread's own stack is known to be.
//!
//! The allocator asks for stacks on every thread of the process, also on those of C libraries, which may have all signals
//! blocked: a fault there could not be survived as in `load`, so there must not be one. Everything between the stack
//! pointer and the top of the stack is there to be read, and the top is known without asking anybody: the C library puts a
//! thread's own data right above its stack, and the main thread's stack ends where the program was started.
//!
//! C code without frame pointers keeps other things in that register. What such a value leads to is taken for a return address only
//! if it points into code; otherwise chance would make endless different stacks of it, each kept for ever.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::OnceLock;

use libc::{dl_phdr_info, size_t};

/// Where the program has code; and the top of its main thread's stack.
struct Process {
    /// The program's own code, then that of its libraries.
    code: Vec<Range<usize>>,
    main_stack_top: usize,
}

static PROCESS: OnceLock<Process> = OnceLock::new();

unsafe extern "C" {
    /// Set by the dynamic loader, which found the arguments of the program there.
    static __libc_stack_end: *const c_void;
}

/// Finds out where code is. To be called before [`own`]; more often does nothing.
pub fn learn() {
    PROCESS.get_or_init(|| {
        let mut code = Vec::new();
        // SAFETY: the callback gets the pointer back, and only during the call.
        unsafe { libc::dl_iterate_phdr(Some(note_code), (&raw mut code).cast()) };
        // SAFETY: a word that is never written after the start.
        Process { code, main_stack_top: unsafe { __libc_stack_end } as usize }
    });
}

/// Notes the executable parts of a loaded file.
unsafe extern "C" fn note_code(info: *mut dl_phdr_info, _size: size_t, code: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr hands both as they were promised.
    let (info, code) = unsafe { (&*info, &mut *code.cast::<Vec<Range<usize>>>()) };
    // SAFETY: the loader's own table and its length.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0 {
            let start = (info.dlpi_addr as usize).wrapping_add(header.p_vaddr as usize);
            code.push(start..start + header.p_memsz as usize);
        }
    }
    0
}

/// Writes the return addresses on the caller's stack into `frames`, its own caller's first, and gives their number. Allocates
/// nothing, locks nothing and cannot fault. Without [`learn`] there are none.
#[inline(never)]
pub fn own(frames: &mut [usize]) -> usize {
    let Some(process) = PROCESS.get() else { return 0 };
    let (mut frame, stack, thread): (usize, usize, usize);
    // SAFETY: registers are read, and the thread's pointer to its own data, which leads to itself.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!(
            "mov {}, rbp", "mov {}, rsp", "mov {}, fs:[0]",
            out(reg) frame, out(reg) stack, out(reg) thread,
            options(readonly, nostack, preserves_flags)
        );
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!(
            "mov {}, x29", "mov {}, sp", "mrs {}, tpidr_el0",
            out(reg) frame, out(reg) stack, out(reg) thread,
            options(nomem, nostack, preserves_flags)
        );
    }
    // The main thread's data are where libraries are, below its stack.
    let top = if thread > stack { thread } else { process.main_stack_top };
    let (mut lowest, mut length) = (stack, 0);
    while length < frames.len()
        && frame >= lowest
        && frame.is_multiple_of(size_of::<usize>())
        && frame.checked_add(2 * size_of::<usize>()).is_some_and(|end| end <= top)
    {
        // SAFETY: both words lie between the stack pointer and the top of this thread's stack.
        let (next, back) = unsafe {
            let pair = frame as *const usize;
            (pair.read_volatile(), pair.add(1).read_volatile())
        };
        if !process.code.iter().any(|code| code.contains(&back)) {
            break;
        }
        frames[length] = back;
        length += 1;
        lowest = frame + 2 * size_of::<usize>();
        frame = next;
    }
    length
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[inline(never)]
    fn deep(levels: usize, frames: &mut [usize]) -> usize {
        let length = if levels == 0 { own(frames) } else { deep(levels - 1, frames) };
        black_box(length)
    }

    /// On this thread: each level is a frame, and all of them are in code.
    fn look() {
        let mut frames = [0; 256];
        let [flat, deeper] = [0, 50].map(|levels| deep(levels, &mut frames));
        assert_eq!(deeper, flat + 50);
        assert_eq!(frames[1..50], [frames[1]; 49], "the same call each time");
        assert_eq!(deep(50, &mut [0; 7]), 7, "what does not fit is cut off");
    }

    #[test]
    fn each_level_of_a_recursion_is_a_frame_on_any_thread() {
        learn();
        look();
        std::thread::scope(|scope| {
            for kilobytes in [64, 2048, 65536] {
                std::thread::Builder::new().stack_size(kilobytes * 1024).spawn_scoped(scope, look).unwrap();
            }
        });
    }

    #[test]
    fn the_main_thread_has_a_known_top() {
        learn();
        // The environment lies above every frame of the main thread, and its strings were put there by the kernel.
        let top = PROCESS.get().unwrap().main_stack_top;
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let after_name = stat.rsplit_once(')').unwrap().1;
        let start: usize = after_name.split_whitespace().nth(25).unwrap().parse().unwrap();
        assert!(top.abs_diff(start) < 4096, "{top:#x}, the kernel says {start:#x}");
    }

    #[test]
    fn whatever_the_register_holds_the_walk_ends_well() {
        learn();
        /// Calls `own` with another value in the frame pointer.
        #[cfg(target_arch = "x86_64")]
        #[inline(never)]
        fn astray(value: usize) -> usize {
            #[unsafe(naked)]
            unsafe extern "C" fn call(_value: usize, _function: extern "C" fn() -> usize) -> usize {
                std::arch::naked_asm!("push rbp", "mov rbp, rdi", "call rsi", "pop rbp", "ret")
            }
            extern "C" fn walk() -> usize {
                own(&mut [0; 64])
            }
            // SAFETY: the register is put back before anything relies on it.
            unsafe { call(value, walk) }
        }
        #[cfg(target_arch = "x86_64")]
        {
            let alone = astray(0);
            assert!(alone >= 1);
            for value in [1, 8, 0x1000, 0xdead_beef, usize::MAX - 7, usize::MAX, 1 << 63, &raw const ELSEWHERE as usize]
            {
                assert_eq!(astray(value), alone, "{value:#x}");
            }
            // What lies on the stack itself and is no return address.
            let data = black_box([0_usize, 0x1234_5678]);
            assert_eq!(astray(&raw const data as usize), alone);
        }
        static ELSEWHERE: usize = 0;
    }
}
