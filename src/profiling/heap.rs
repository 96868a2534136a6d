//! The heap profile: what is allocated and not freed, by stack.

use std::collections::HashMap;
use std::ffi::c_void;

use anyhow::{Context as _, anyhow};
use jemalloc_pprof::{PROF_CTL, StackProfile};

/// Takes a profile: gzipped pprof with symbols inside. Blocks for up to a second, so not for an async thread.
pub(super) fn profile() -> anyhow::Result<Vec<u8>> {
    let control = PROF_CTL.as_ref().ok_or_else(|| anyhow!("the allocator was started without prof:true"))?;
    let mut profile = control.blocking_lock().dump_profile().with_context(|| {
        format!("the allocator could not write its dump to {}; is it writable?", std::env::temp_dir().display())
    })?;
    let _symbols = SymbolCache;
    drop_allocator_frames(&mut profile);
    Ok(profile.to_pprof(("inuse_space", "bytes"), ("space", "bytes"), None))
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
