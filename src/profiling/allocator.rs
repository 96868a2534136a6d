//! The allocator's start-up settings, and whether it samples.

use std::ffi::c_char;

use anyhow::Context as _;
use jemalloc_pprof::PROF_CTL;

use super::sampling::{self, Stacks};
use super::{heap, symbols};

/// A pointer to a C string, which is what jemalloc reads.
#[repr(transparent)]
pub struct MallocConf(*const c_char);

// SAFETY: it points to a constant.
unsafe impl Sync for MallocConf {}

/// jemalloc's settings, read by it before `main` under this symbol's name; the variable `MALLOC_CONF` overrides them.
///
/// - `prof:true,prof_active:true`: samples from the first allocation on, because what is allocated before sampling
///   starts is in no profile for ever. `prof` cannot be switched on later.
/// - `lg_prof_sample:19`: one sample in 512 KiB on average. At 100 MB allocated a second that is 0.1 to 0.4 % of a core.
/// - `prof_accum:true`: counts what was freed as well, for `allocs`. The allocator then keeps each stack that it ever met,
///   for each thread: bounded by the code's paths, and by threads being few and long-lived.
/// - `background_thread:true`: freed memory goes back to the system also when nothing is allocated any more, and not on
///   the account of whoever allocates next.
/// - `narenas:1`: by default there are four for each processor. A thread is given to one of them and takes memory from no
///   other, so each keeps freed and partly used pages of its own, the more the longer an event lasts. With two, 170,000 listings had
///   41 MiB resident at most and with one 36, at the same rate and processor time on two processors (docs/performance.md). Where
///   many more are busy and threads wait for it, `MALLOC_CONF=narenas:N` gives them more.
/// - `lg_extent_max_active_fit:12`: freed pages are used again also where they lie in a stretch up to 4,096 times as large as what is
///   asked for, instead of 64 times. With it 170,000 listings need 5 % more than 17,000, without it 17 % (docs/performance.md).
/// - `lg_tcache_max:10,tcache_nslots_small_max:40`: a thread's cache keeps blocks up to 1 KiB, and up to 40 of a size. With the defaults,
///   32 KiB and 200, the caches of an idle service held 1.9 MiB more: 1.3 those above 4 KiB (24.8 MiB against 26.1) and 0.6 the others (23.6
///   against 24.2). Publishing took no more processor time, and 0.6 to 1.2 MiB less (docs/performance.md).
/// - `dirty_decay_ms:3000`: freed pages go back along a curve that ends after three seconds. Under load they are used
///   again within milliseconds, so that the system is asked for hardly any; after an event they are gone in time.
/// - `muzzy_decay_ms:0`: and they go back at once and for good (MADV_DONTNEED). The state between, MADV_FREE, would
///   leave them in the resident set until the machine runs short of memory.
#[unsafe(export_name = "malloc_conf")]
pub static MALLOC_CONF: MallocConf = MallocConf(
    c"prof:true,prof_active:true,prof_accum:true,lg_prof_sample:19,background_thread:true,narenas:1,lg_extent_max_active_fit:12,lg_tcache_max:10,tcache_nslots_small_max:40,dirty_decay_ms:3000,muzzy_decay_ms:0"
        .as_ptr(),
);

/// Lets the allocator sample, or stop it and forget what it sampled. To be called once, at the start.
pub fn sample_allocations(enabled: bool) -> anyhow::Result<()> {
    let Some(control) = PROF_CTL.as_ref() else {
        if enabled {
            anyhow::bail!(
                "profiling.enabled: the allocator was started without prof:true; take prof:false out of MALLOC_CONF, or set WRITE_API_PROFILING_ENABLED=false"
            );
        }
        return Ok(());
    };
    if enabled {
        try_out();
    }
    let mut control = control.try_lock().context("profiling.enabled: a profile is being taken")?;
    let changed = if enabled { control.activate() } else { control.deactivate() };
    changed.context("profiling.enabled: the allocator does not take prof.active")
}

/// Installs the hook that labels samples, and tells what profiles will lack in this process. Each is a reason for a worse
/// profile and none for no service.
fn try_out() {
    match sampling::install() {
        Ok(Stacks::FramePointers) => {}
        Ok(Stacks::Unwinder) => tracing::warn!(
            "this program was built without frame pointers: samples of memory cost ten times as much; build it with -C force-frame-pointers=yes"
        ),
        Err(error) => tracing::warn!(
            error = format!("{error:#}"),
            "heap profiles cannot tell whose memory it is, all of it is labelled service"
        ),
    }
    match symbols::program_has_symbols() {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!("this program was stripped of its symbols: profiles show addresses instead of functions")
        }
        Err(error) => tracing::warn!(
            error = format!("{error:#}"),
            "this program's file cannot be read: profiles show addresses instead of functions"
        ),
    }
    if !heap::counts_totals() {
        tracing::warn!(
            "the allocator was started without prof_accum:true: allocs is refused, heap has no totals; take prof_accum:false out of MALLOC_CONF"
        );
    }
}

#[cfg(test)]
mod tests {
    use tikv_jemalloc_ctl::raw;

    /// The allocator tells of a setting that it does not know on stderr only, and goes on without it.
    #[test]
    fn the_settings_are_the_allocators() {
        // SAFETY: each has the type that the allocator's manual gives it.
        unsafe {
            assert!(raw::read::<bool>(b"opt.prof\0").unwrap() && raw::read::<bool>(b"opt.prof_accum\0").unwrap());
            assert!(raw::read::<bool>(b"opt.background_thread\0").unwrap());
            assert_eq!(raw::read::<usize>(b"opt.lg_prof_sample\0").unwrap(), 19);
            assert_eq!(raw::read::<u32>(b"opt.narenas\0").unwrap(), 1);
            assert_eq!(raw::read::<usize>(b"opt.lg_extent_max_active_fit\0").unwrap(), 12);
            assert_eq!(raw::read::<usize>(b"opt.tcache_max\0").unwrap(), 1024);
            assert_eq!(raw::read::<u32>(b"opt.tcache_nslots_small_max\0").unwrap(), 40);
            assert_eq!(raw::read::<isize>(b"opt.dirty_decay_ms\0").unwrap(), 3_000);
            assert_eq!(raw::read::<isize>(b"opt.muzzy_decay_ms\0").unwrap(), 0);
        }
    }
}
