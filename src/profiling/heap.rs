//! Memory by stack and by kind of event: what is held (`heap`) and what was ever allocated (`allocs`).

use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::ptr;

use anyhow::{Context as _, anyhow};
use jemalloc_pprof::PROF_CTL;
use tikv_jemalloc_ctl::raw;

use super::objects::Objects;
use super::pprof::{Builder, Label, Profile, ValueType, combine};
use super::{jeheap, now, sampling, symbols};
use crate::task::mark::{Mark, Stage};

/// The label with the kind of event that a sample belongs to; memory of no event is `service`.
pub const EVENT_KIND: &str = "event_kind";

/// The label with the part of an event's work: `read`, `call`, `write`, `publish`. Other work has none.
pub const STAGE: &str = "stage";

/// The labels of what was done under a mark.
pub(super) fn labels(mark: Mark) -> Vec<Label> {
    let mut labels = vec![Label::text(EVENT_KIND, mark.kind.name())];
    if mark.stage != Stage::Other {
        labels.push(Label::text(STAGE, mark.stage.name()));
    }
    labels
}

/// What readers look at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// What is held.
    Heap,
    /// What was allocated since the start.
    Allocs,
}

impl View {
    fn sample_type(self) -> &'static str {
        match self {
            View::Heap => "inuse_space",
            View::Allocs => "alloc_space",
        }
    }
}

/// Takes a profile with Go's four sample types, its functions named. Blocks for up to a second, so not for an async thread.
pub(super) fn profile(view: View) -> anyhow::Result<Profile> {
    let _unsampled = Unsampled::this_thread();
    if view == View::Allocs && !counts_totals() {
        anyhow::bail!("the allocator was started without prof_accum:true; put it into MALLOC_CONF, and restart");
    }
    let mut builder = Builder::new(Profile {
        sample_types: vec![
            ValueType::new("alloc_objects", "count"),
            ValueType::new("alloc_space", "bytes"),
            ValueType::new("inuse_objects", "count"),
            ValueType::new("inuse_space", "bytes"),
        ],
        default_sample_type: view.sample_type().to_owned(),
        period_type: ValueType::new("space", "bytes"),
        time_nanos: now(),
        comments: vec![concat!("write-api ", env!("CARGO_PKG_VERSION")).to_owned()],
        ..Profile::default()
    });
    let objects = Objects::of_this_process();
    objects.program_first(&mut builder);
    let mut places = Vec::new();
    let period = jeheap::read(BufReader::new(dump()?), |stack| {
        let (mark, addresses) = match stack.addresses.split_last() {
            Some((last, addresses)) if let Some(mark) = sampling::mark_at(*last) => (mark, addresses),
            _ => (Mark::NONE, stack.addresses.as_slice()),
        };
        places.clear();
        // A return address is that of the next instruction, which may belong to another line or function.
        places.extend(addresses.iter().map(|address| objects.location(&mut builder, address.saturating_sub(1))));
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let (total, live) = (stack.total, stack.live);
        let values = [total.objects, total.bytes, live.objects, live.bytes].map(number);
        builder.add(&places, &values, &labels(mark));
    })?;
    let mut profile = builder.finish();
    profile.period = i64::try_from(period).unwrap_or(i64::MAX);
    symbols::resolve(&mut profile);
    drop_allocator_frames(&mut profile);
    // Stacks that differed in the allocator only are one now, and nothing names its functions any more.
    combine(&[(&profile, 1)]).context("putting equal stacks together")
}

/// Whether the allocator counts what was freed as well.
pub(super) fn counts_totals() -> bool {
    // SAFETY: a bool, by the allocator's manual.
    unsafe { raw::read(b"opt.prof_accum\0") }.unwrap_or(false)
}

/// Gives freed memory that the allocator keeps back to the system: what this thread has for itself, and all unused pages.
pub(super) fn give_back() -> anyhow::Result<()> {
    // That number stands for all arenas.
    for control in [c"thread.tcache.flush", c"arena.4096.purge"] {
        // SAFETY: neither takes or gives a value, by the allocator's manual.
        let code = unsafe {
            tikv_jemalloc_sys::mallctl(control.as_ptr(), ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), 0)
        };
        anyhow::ensure!(code == 0, "the allocator refuses {control:?}: {}", io::Error::from_raw_os_error(code));
    }
    Ok(())
}

/// A thread whose allocations are not sampled: what taking a profile needs belongs to no profile, and the allocator would
/// keep the stacks of a thread that ends for ever.
pub(super) struct Unsampled {
    former: Option<bool>,
}

impl Unsampled {
    /// This thread, until it is dropped.
    pub fn this_thread() -> Self {
        // SAFETY: a bool, by the allocator's manual.
        Unsampled { former: unsafe { raw::update(b"thread.prof.active\0", false) }.ok() }
    }
}

impl Drop for Unsampled {
    fn drop(&mut self) {
        if let Some(former) = self.former {
            // SAFETY: as above. It was possible to switch it off, so it can be switched on.
            let _ = unsafe { raw::write(b"thread.prof.active\0", former) };
        }
    }
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

/// Takes the allocator's own frames off the stacks. They stand first on every one of them, and with them all memory
/// would be charged to the function with which the allocator reads the stack.
fn drop_allocator_frames(profile: &mut Profile) {
    let functions: Vec<bool> = profile.functions.iter().map(|function| is_allocator(&function.name)).collect();
    // Where a function of the allocator was inlined into another, that other stays.
    for location in &mut profile.locations {
        let inner = location.lines.iter().take_while(|line| functions[line.function]).count();
        if inner < location.lines.len() {
            location.lines.drain(..inner);
        }
    }
    let locations: Vec<bool> = profile
        .locations
        .iter()
        .map(|location| !location.lines.is_empty() && location.lines.iter().all(|line| functions[line.function]))
        .collect();
    for sample in &mut profile.samples {
        // One stays, so that nothing is left without a stack.
        let most = sample.locations.len().saturating_sub(1);
        let inner = sample.locations.iter().take(most).take_while(|index| locations[**index]).count();
        sample.locations.drain(..inner);
    }
}

/// Functions between a Rust collection, or C code, and the system's memory. Static functions of jemalloc go by their plain
/// names; what the symbol table does not name stays.
fn is_allocator(function: &str) -> bool {
    const EXACT: [&str; 6] = ["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "do_rallocx"];
    const PREFIXES: [&str; 12] = [
        "_rjem_",
        "je_",
        "prof_",
        "imalloc",
        "write_api::profiling::sampling::",
        "write_api::task::cost::heap_sample",
        "__rust_",
        "__rustc::__",
        "alloc::alloc::",
        "alloc::raw_vec::",
        "<alloc::raw_vec::",
        "<tikv_jemallocator::",
    ];
    EXACT.contains(&function) || PREFIXES.iter().any(|prefix| function.starts_with(prefix))
}
