//! The heap profile: what is allocated and not freed, by stack.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use anyhow::{Context as _, anyhow};
use jemalloc_pprof::PROF_CTL;
use pprof_util::{StackProfile, parse_jeheap};
use tikv_jemalloc_ctl::raw;

/// Takes a profile: gzipped pprof with symbols inside. Blocks for up to a second, so not for an async thread.
pub(super) fn profile() -> anyhow::Result<Vec<u8>> {
    let mut profile = parse_jeheap(BufReader::new(dump()?), mappings::MAPPINGS.as_deref())?;
    let _symbols = SymbolCache;
    drop_allocator_frames(&mut profile);
    Ok(profile.to_pprof(("inuse_space", "bytes"), ("space", "bytes"), None))
}

/// The allocator's dump, as text. It writes to a path only; this one leads to memory, so that neither a read-only root
/// nor a full disk keeps anybody from a profile. Blocks.
pub(super) fn dump() -> anyhow::Result<File> {
    let control = PROF_CTL.as_ref().ok_or_else(|| anyhow!("the allocator was started without prof:true"))?;
    let file = memory_file().context("no file in memory (memfd_create) for the allocator's dump")?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let name = CString::new(path.as_str()).expect("a number has no zero byte");
    // Held while the allocator writes: sampling must not be switched meanwhile.
    let _control = control.blocking_lock();
    // SAFETY: prof.dump takes a pointer to a C string, which outlives the call.
    unsafe { raw::write(b"prof.dump\0", name.as_ptr()) }
        .with_context(|| format!("the allocator could not write its dump to {path}; is /proc mounted?"))?;
    // The allocator opened the file for itself, so that this end is still at the beginning.
    Ok(file)
}

/// An empty file that exists only in memory and goes with its descriptor.
fn memory_file() -> io::Result<File> {
    let create = |flags| {
        // SAFETY: the name is a C string.
        let descriptor = unsafe { libc::memfd_create(c"heap dump".as_ptr(), flags) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(unsafe { File::from_raw_fd(descriptor) })
    };
    // Hardened systems demand the promise that the file is never executed; kernels before 6.3 do not know it.
    match create(libc::MFD_CLOEXEC | libc::MFD_NOEXEC_SEAL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create(libc::MFD_CLOEXEC),
        made => made,
    }
}

/// Empties the cache of symbols when it goes: tens of megabytes, needed again only for the next profile.
struct SymbolCache;

impl Drop for SymbolCache {
    fn drop(&mut self) {
        backtrace::clear_symbol_cache();
    }
}

/// Takes the allocator's own frames off the stacks. They stand first on every one of them, and with them all memory
/// would be charged to the function with which jemalloc reads the stack.
fn drop_allocator_frames(profile: &mut StackProfile) {
    let mut known = HashMap::new();
    for (stack, _) in &mut profile.stacks {
        // The caller comes before the callee.
        while let Some(&address) = stack.addrs.last()
            && stack.addrs.len() > 1
            && *known.entry(address).or_insert_with(|| is_in_allocator(address))
        {
            stack.addrs.pop();
        }
    }
}

fn is_in_allocator(return_address: usize) -> bool {
    let mut found = false;
    // The same step back as the encoder's, so that both see the same function.
    backtrace::resolve((return_address - 1) as *mut c_void, |symbol| {
        found |= symbol.name().is_some_and(|name| is_allocator(&format!("{name:#}")));
    });
    found
}

/// Functions between a Rust collection, or C code, and the system's memory. Static functions of jemalloc go by their plain
/// names; what the symbol table does not name stays.
fn is_allocator(function: &str) -> bool {
    const EXACT: [&str; 6] = ["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "do_rallocx"];
    const PREFIXES: [&str; 10] = [
        "_rjem_",
        "je_",
        "prof_",
        "imalloc",
        "__rust_",
        "__rustc::__",
        "alloc::alloc::",
        "alloc::raw_vec::",
        "<alloc::raw_vec::",
        "<tikv_jemallocator::",
    ];
    EXACT.contains(&function) || PREFIXES.iter().any(|prefix| function.starts_with(prefix))
}
