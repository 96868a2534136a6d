//! Samples of the CPU time of every thread of the process.
//!
//! Each thread gets a timer of its own on its CPU clock, whose signal goes to that thread: a busy thread is sampled in
//! proportion to its time however many there are, and an idle one not at all. Threads need not know of it, so those of C
//! libraries are seen as well; threads that are started later are found within a tenth of a second.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{io, mem, ptr, thread};

use anyhow::Context as _;
use libc::{siginfo_t, ucontext_t};

use super::ring::Ring;
use crate::stack::{self, Registers, walk};
use crate::task::cost::{self, Held, Part};
use crate::task::mark;

/// How often samples are collected and new threads looked for.
const TURN: Duration = Duration::from_millis(100);

/// Stacks with what was seen of them.
pub type Counts = HashMap<Key, u64>;

/// What samples are counted by.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The innermost frame first.
    pub stack: Box<[usize]>,
    pub thread: i32,
    pub mark: u16,
}

/// A finished recording.
#[derive(Debug, Default)]
pub struct Recording {
    /// Periods of CPU time, by stack.
    pub counts: Counts,
    /// Names of the threads that were seen, by the kernel's number.
    pub threads: HashMap<i32, String>,
    /// CPU time of each thread since it was first seen, by its clock.
    pub cpu_time: HashMap<i32, Duration>,
    /// Periods whose stacks were lost, because too many came at once.
    pub lost: u64,
    pub period: Duration,
    pub duration: Duration,
    /// Threads that could not be sampled, and why.
    pub refused: Option<(usize, io::Error)>,
}

/// The recording that is under way, for the handler. One at a time.
static ACTIVE: AtomicPtr<Active> = AtomicPtr::new(ptr::null_mut());

/// Handlers that may be looking at it.
static IN_HANDLER: AtomicUsize = AtomicUsize::new(0);

/// Nanoseconds that a signal takes beside what its handler does, by a trial.
static DELIVERY: AtomicU64 = AtomicU64::new(0);

struct Active {
    ring: Ring,
    /// Tells its timers from those of recordings before, whose signals may come late.
    number: u32,
}

/// Records for `duration` at `hz` samples per second of CPU time. Blocks: `pause` is called for each stretch of waiting, and
/// its error ends the recording. One at a time in a process; a second one is refused.
pub fn record(
    duration: Duration,
    hz: u32,
    pause: impl Fn(Duration) -> anyhow::Result<()>,
) -> anyhow::Result<Recording> {
    install().context("the handlers of SIGPROF and SIGSEGV")?;
    let begin = Instant::now();
    let period = Duration::from_secs(1) / hz;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    // Twice what a turn brings when every core is busy.
    let places = (2 * cores * hz as usize * TURN.as_millis() as usize / 1000).clamp(256, 16 * 1024);
    let session = Session::begin(Ring::new(places))?;
    let mut timers =
        Timers { session: session.number, period, of: HashMap::new(), cpu_time: HashMap::new(), refused: None };
    let mut recording = Recording { period, duration, ..Recording::default() };
    loop {
        timers.cover(&mut recording).context("/proc/self/task")?;
        let left = duration.saturating_sub(begin.elapsed());
        if left.is_zero() {
            break;
        }
        pause(left.min(TURN))?;
        session.drain(&mut recording.counts);
    }
    recording.duration = begin.elapsed();
    recording.refused = timers.refused.take();
    drop(timers);
    recording.lost = session.end(&mut recording.counts);
    Ok(recording)
}

struct Session {
    active: *mut Active,
    number: u32,
    _held: Held,
}

impl Session {
    fn begin(ring: Ring) -> anyhow::Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed) as u32;
        let held = Held::new(ring.memory());
        let active = Box::into_raw(Box::new(Active { ring, number }));
        if ACTIVE.compare_exchange(ptr::null_mut(), active, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            // SAFETY: nobody else has seen it.
            drop(unsafe { Box::from_raw(active) });
            anyhow::bail!("CPU time is being sampled already");
        }
        Ok(Session { active, number, _held: held })
    }

    fn drain(&self, counts: &mut Counts) {
        // SAFETY: it lives until the session ends.
        unsafe { &*self.active }.ring.drain(|sample| {
            let key = Key { stack: sample.frames().into(), thread: sample.thread, mark: sample.mark };
            *counts.entry(key).or_default() += u64::from(sample.periods);
        });
    }

    /// Takes what is left, and gives the number of lost periods. The timers must be gone.
    fn end(self, counts: &mut Counts) -> u64 {
        self.hide();
        self.drain(counts);
        // SAFETY: it lives until the drop.
        unsafe { &*self.active }.ring.lost()
    }

    /// From here on no handler looks at the ring.
    fn hide(&self) {
        ACTIVE.store(ptr::null_mut(), Ordering::SeqCst);
        while IN_HANDLER.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hide();
        // SAFETY: made by into_raw; no handler can see it any more.
        drop(unsafe { Box::from_raw(self.active) });
    }
}

/// A timer for each thread.
struct Timers {
    session: u32,
    period: Duration,
    of: HashMap<i32, Option<libc::timer_t>>,
    /// CPU time of each thread when it was first seen.
    cpu_time: HashMap<i32, Duration>,
    refused: Option<(usize, io::Error)>,
}

impl Timers {
    /// Gives a timer to each thread that has none.
    fn cover(&mut self, recording: &mut Recording) -> io::Result<()> {
        for entry in std::fs::read_dir("/proc/self/task")? {
            let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // Each time: a new thread has its parent's name until it gives itself one.
            if let Ok(name) = std::fs::read_to_string(format!("/proc/self/task/{tid}/comm")) {
                recording.threads.insert(tid, name.trim_end().to_owned());
            }
            if let Some(cpu_time) = cpu_time(tid) {
                let before = *self.cpu_time.entry(tid).or_insert(cpu_time);
                recording.cpu_time.insert(tid, cpu_time.saturating_sub(before));
            }
            if self.of.contains_key(&tid) {
                continue;
            }
            let timer = match start_timer(tid, self.session, self.period) {
                Ok(timer) => Some(timer),
                // It has ended meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ESRCH)) => None,
                Err(error) => {
                    self.refused.get_or_insert((0, error)).0 += 1;
                    None
                }
            };
            self.of.insert(tid, timer);
        }
        Ok(())
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        for timer in self.of.values().flatten() {
            // SAFETY: it was made and is deleted once.
            unsafe { libc::timer_delete(*timer) };
        }
    }
}

/// The CPU clock of a thread of this process: the kernel's encoding, which `pthread_getcpuclockid` gives for threads that one
/// has a handle of (linux/posix-timers.h).
fn cpu_clock(tid: i32) -> libc::clockid_t {
    const PER_THREAD: i32 = 4;
    const SCHEDULED: i32 = 2;
    (!tid << 3) | PER_THREAD | SCHEDULED
}

/// CPU time of a thread since its start; `None` if it has ended.
fn cpu_time(tid: i32) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for the call.
    let result = unsafe { libc::clock_gettime(cpu_clock(tid), &mut time) };
    (result == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

fn start_timer(tid: i32, session: u32, period: Duration) -> io::Result<libc::timer_t> {
    let told = u64::from(session) << 32 | u64::from(tid as u32);
    // SAFETY: all zero is a valid sigevent.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGPROF;
    event.sigev_notify_thread_id = tid;
    event.sigev_value = libc::sigval { sival_ptr: ptr::without_provenance_mut(told as usize) };
    let mut timer: libc::timer_t = ptr::null_mut();
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::timer_create(cpu_clock(tid), &mut event, &mut timer) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let every = timespec(period);
    let times = libc::itimerspec { it_interval: every, it_value: every };
    // SAFETY: the timer was just made.
    if unsafe { libc::timer_settime(timer, 0, &times, ptr::null_mut()) } != 0 {
        let error = io::Error::last_os_error();
        // SAFETY: and is deleted once.
        unsafe { libc::timer_delete(timer) };
        return Err(error);
    }
    Ok(timer)
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec { tv_sec: duration.as_secs() as libc::time_t, tv_nsec: duration.subsec_nanos().into() }
}

/// Installs the handler, for good: a signal that comes after the last timer is gone would end the process otherwise.
fn install() -> io::Result<()> {
    stack::install()?;
    static DONE: Once = Once::new();
    let mut result = Ok(());
    DONE.call_once(|| {
        // SAFETY: all zero is a valid sigaction.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = on_time_is_up as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: the handler only does what signal handlers may.
        if unsafe { libc::sigaction(libc::SIGPROF, &action, ptr::null_mut()) } != 0 {
            result = Err(io::Error::last_os_error());
            return;
        }
        DELIVERY.store(delivery().as_nanos() as u64, Ordering::Relaxed);
    });
    result
}

/// What it takes to be interrupted and to go on: the least of some signals that this thread sends to itself, which their handler
/// does nothing for.
fn delivery() -> Duration {
    let once = || {
        let begin = Instant::now();
        // SAFETY: its handler is installed.
        unsafe { libc::raise(libc::SIGPROF) };
        begin.elapsed()
    };
    std::iter::repeat_with(once).take(32).min().unwrap_or_default()
}

/// What the kernel tells of a timer's signal (siginfo_t, the part of POSIX timers).
#[repr(C)]
struct TimerSignal {
    signal: c_int,
    error: c_int,
    code: c_int,
    // The union that follows is aligned to eight bytes.
    _padding: c_int,
    timer: c_int,
    overrun: c_int,
    value: usize,
}

extern "C" fn on_time_is_up(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: a pointer to this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid as long as the thread is.
    let before = unsafe { *errno };
    IN_HANDLER.fetch_add(1, Ordering::SeqCst);
    // SAFETY: while IN_HANDLER is not zero, what ACTIVE points to is not freed.
    if let Some(active) = unsafe { ACTIVE.load(Ordering::SeqCst).as_ref() } {
        // SAFETY: with SA_SIGINFO the kernel hands both, and the code says which part of the union it filled.
        let (told, registers) = unsafe { (&*info.cast::<TimerSignal>(), registers(&*context.cast::<ucontext_t>())) };
        if told.code == libc::SI_TIMER && (told.value >> 32) as u32 == active.number {
            let periods = 1 + told.overrun.max(0) as u32;
            let delivery = Duration::from_nanos(DELIVERY.load(Ordering::Relaxed));
            cost::timed(Part::CpuSamples, delivery, || {
                active.ring.add(told.value as u32 as i32, periods, mark::current().index() as u16, |frames| {
                    walk(registers, frames)
                });
            });
        }
    }
    IN_HANDLER.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { *errno = before };
}

#[cfg(target_arch = "x86_64")]
fn registers(context: &ucontext_t) -> Registers {
    let registers = &context.uc_mcontext.gregs;
    Registers {
        counter: registers[libc::REG_RIP as usize] as usize,
        frame: registers[libc::REG_RBP as usize] as usize,
        stack: registers[libc::REG_RSP as usize] as usize,
    }
}

#[cfg(target_arch = "aarch64")]
fn registers(context: &ucontext_t) -> Registers {
    let machine = &context.uc_mcontext;
    Registers { counter: machine.pc as usize, frame: machine.regs[29] as usize, stack: machine.sp as usize }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn sleep(pause: Duration) -> anyhow::Result<()> {
        thread::sleep(pause);
        Ok(())
    }

    fn within(duration: Duration, mut work: impl FnMut()) {
        let begin = Instant::now();
        while begin.elapsed() < duration {
            work();
        }
    }

    #[inline(never)]
    fn spin_here(duration: Duration) {
        within(duration, || {
            black_box((0..1000).fold(0u64, |sum, next| sum ^ black_box(next)));
        });
        black_box(());
    }

    /// One recording at a time.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn a_busy_thread_is_seen_in_proportion_and_an_idle_one_is_not() {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let busy = thread::Builder::new().name("busy".into()).spawn(|| spin_here(Duration::from_millis(1300))).unwrap();
        let idle =
            thread::Builder::new().name("idle".into()).spawn(|| thread::sleep(Duration::from_millis(1300))).unwrap();
        let recording = record(Duration::from_secs(1), 100, sleep).unwrap();
        busy.join().unwrap();
        idle.join().unwrap();
        let of = |name: &str| -> u64 {
            recording
                .counts
                .iter()
                .filter(|(key, _)| recording.threads[&key.thread] == name)
                .map(|(_, count)| count)
                .sum()
        };
        assert!((20..=110).contains(&of("busy")), "{}", of("busy"));
        assert_eq!(of("idle"), 0);
        let inside = recording
            .counts
            .keys()
            .filter(|key| recording.threads[&key.thread] == "busy" && key.stack.len() > 4)
            .count();
        assert!(inside > 0);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn garbage_in_the_frame_pointer_crashes_nothing() {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let wild = thread::spawn({
            let stop = stop.clone();
            move || {
                let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
                while !stop.load(Ordering::Relaxed) {
                    // Half of the time anything at all, else what looks like an address.
                    let mask = if seed.is_multiple_of(2) { !7 } else { 0x7fff_ffff_fff8_u64 };
                    // SAFETY: the frame pointer is put back.
                    unsafe {
                        std::arch::asm!(
                            "push rbp",
                            "mov rbp, {seed}",
                            "mov rcx, 1000",
                            "2:",
                            "imul rbp, rbp, 1664525",
                            "add rbp, rsp",
                            "and rbp, {mask}",
                            "dec rcx",
                            "jnz 2b",
                            "pop rbp",
                            seed = in(reg) seed,
                            mask = in(reg) mask,
                            out("rcx") _,
                        );
                    }
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                }
            }
        });
        let recording = record(Duration::from_secs(1), 1000, sleep).unwrap();
        stop.store(true, Ordering::Relaxed);
        wild.join().unwrap();
        let all: u64 = recording.counts.values().sum();
        assert!(all > 100, "{all}");
    }

    #[test]
    fn a_second_recording_is_refused_and_an_error_of_the_pause_ends_the_first() {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let first = thread::spawn({
            let stop = std::sync::Arc::clone(&stop);
            move || {
                record(Duration::from_secs(60), 100, |pause| {
                    anyhow::ensure!(!stop.load(Ordering::Relaxed), "told to stop");
                    sleep(pause)
                })
            }
        });
        while ACTIVE.load(Ordering::SeqCst).is_null() {
            thread::yield_now();
        }
        let refused = record(Duration::from_secs(1), 100, sleep).unwrap_err().to_string();
        assert_eq!(refused, "CPU time is being sampled already");
        stop.store(true, Ordering::Relaxed);
        assert_eq!(first.join().unwrap().unwrap_err().to_string(), "told to stop");
        assert!(ACTIVE.load(Ordering::SeqCst).is_null());
        // A signal out of nowhere does nothing.
        // SAFETY: its handler is installed.
        unsafe { libc::raise(libc::SIGPROF) };
    }

    #[test]
    fn threads_started_later_are_seen() {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let later = thread::spawn(|| {
            thread::sleep(Duration::from_millis(200));
            thread::Builder::new()
                .name("later".into())
                .spawn(|| spin_here(Duration::from_millis(700)))
                .unwrap()
                .join()
                .unwrap();
        });
        let recording = record(Duration::from_secs(1), 100, sleep).unwrap();
        later.join().unwrap();
        let seen: u64 =
            recording.counts.iter().filter(|(key, _)| recording.threads[&key.thread] == "later").map(|(_, c)| c).sum();
        assert!(seen >= 10, "{seen}");
    }
}
