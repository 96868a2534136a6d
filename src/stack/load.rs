//! Reading a word of memory that may not be there.
//!
//! A walk along frame pointers meets code that keeps something else in that register. [`word`] reads wherever such a value
//! leads: where no memory is, the fault comes back as `None`. It works inside signal handlers and beside the handler for stack
//! overflows that Rust installs, which keeps all faults but these.

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::OnceLock;

use libc::{siginfo_t, ucontext_t};

/// What a read gives: the word, and whether it faulted. Two registers by the C calling convention.
#[repr(C)]
struct Loaded {
    word: usize,
    faulted: usize,
}

/// Reads at `address`. Its first instruction is the one that may fault.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
extern "C" fn load(address: usize) -> Loaded {
    naked_asm!("mov rax, [rdi]", "xor edx, edx", "ret")
}

/// Where [`load`] goes on after a fault.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
extern "C" fn faulted() -> Loaded {
    naked_asm!("mov edx, 1", "ret")
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
extern "C" fn load(address: usize) -> Loaded {
    naked_asm!("ldr x0, [x0]", "mov x1, #0", "ret")
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
extern "C" fn faulted() -> Loaded {
    naked_asm!("mov x1, #1", "ret")
}

/// The handlers that were there before ours.
static FORMER: OnceLock<[libc::sigaction; 2]> = OnceLock::new();

/// Signals of a read from where nothing can be read: no mapping, or a mapped file that has become shorter.
const FAULTS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Lets `word` survive a fault. Once in a process; more often does nothing.
pub fn install() -> io::Result<()> {
    if FORMER.get().is_some() {
        return Ok(());
    }
    // SAFETY: all zero is a valid sigaction, which the calls fill.
    let mut former: [libc::sigaction; 2] = unsafe { std::mem::zeroed() };
    for (signal, former) in FAULTS.into_iter().zip(&mut former) {
        // SAFETY: the pointer is valid and null asks only.
        if unsafe { libc::sigaction(signal, std::ptr::null(), former) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // Known before the first fault can be ours.
    if FORMER.set(former).is_err() {
        return Ok(());
    }
    for signal in FAULTS {
        // SAFETY: all zero is a valid sigaction.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        ours.sa_sigaction = on_fault as *const () as usize;
        // On the alternative stack, as Rust's own: a stack overflow has to be told from there.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler only does what signal handlers may.
        if unsafe { libc::sigaction(signal, &ours, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel hands the interrupted registers.
    let counter = unsafe { program_counter(&mut *context.cast::<ucontext_t>()) };
    if *counter == load as *const () as usize {
        *counter = faulted as *const () as usize;
        return;
    }
    // Somebody else's fault.
    let former = FORMER.get().and_then(|all| FAULTS.iter().position(|fault| *fault == signal).map(|at| &all[at]));
    match former {
        Some(former) if former.sa_sigaction != libc::SIG_DFL && former.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: the kernel would have called it in the same way, with the arguments that its flags ask for.
            unsafe {
                if former.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                        std::mem::transmute(former.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(c_int) = std::mem::transmute(former.sa_sigaction);
                    handler(signal);
                }
            }
        }
        _ => {
            // SAFETY: all zero is SIG_DFL without flags; the fault happens again on return and ends the process as it would.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn program_counter(context: &mut ucontext_t) -> &mut usize {
    // SAFETY: i64 and usize have the same size here.
    unsafe { &mut *(&raw mut context.uc_mcontext.gregs[libc::REG_RIP as usize]).cast::<usize>() }
}

#[cfg(target_arch = "aarch64")]
fn program_counter(context: &mut ucontext_t) -> &mut usize {
    // SAFETY: u64 and usize have the same size here.
    unsafe { &mut *(&raw mut context.uc_mcontext.pc).cast::<usize>() }
}

/// The word at `address`, if there is memory. Needs [`install`].
pub fn word(address: usize) -> Option<usize> {
    let Loaded { word, faulted } = load(address);
    (faulted == 0).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_read_where_memory_is_and_only_there() {
        install().unwrap();
        let here = 0x1234_usize;
        assert_eq!(word(&raw const here as usize), Some(0x1234));
        for nowhere in [0, 8, 0xdead_beef, usize::MAX - 7, 1 << 63] {
            assert_eq!(word(nowhere), None, "{nowhere:#x}");
        }
        assert_eq!(word(&raw const here as usize), Some(0x1234), "after a fault");
    }

    #[test]
    fn an_unmapped_page_is_no_memory() {
        install().unwrap();
        // SAFETY: a private mapping of our own.
        unsafe {
            let page =
                libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            assert_eq!(word(page as usize + 8), Some(0));
            libc::munmap(page, 4096);
            assert_eq!(word(page as usize + 8), None);
        }
    }
}
