//! Memory and processor time of a process, as Linux counts them.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

const INTERVAL: Duration = Duration::from_millis(100);

/// Memory of a process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Resident memory in MiB.
    pub rss_mib: f64,
    /// The part of it that is not a file's, in MiB: heap and stacks.
    pub anonymous_mib: f64,
}

/// [`Memory`] with its time.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Since the sampling was started, in seconds.
    pub seconds: f64,
    /// What was found then.
    #[serde(flatten)]
    pub memory: Memory,
}

/// Samples a process ten times a second, until dropped.
#[derive(Debug)]
pub struct Sampler {
    process: u32,
    started: Instant,
    samples: Arc<Mutex<Vec<Sample>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Starts to sample the process with this id.
    pub fn start(process: u32) -> Result<Self> {
        let (samples, ended) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let started = Instant::now();
        let sample = {
            let (samples, ended) = (samples.clone(), ended.clone());
            move || {
                while !ended.load(Ordering::Relaxed) {
                    if let Ok(memory) = memory_of(process) {
                        let sample = Sample { seconds: started.elapsed().as_secs_f64(), memory };
                        samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                    }
                    thread::sleep(INTERVAL);
                }
            }
        };
        let thread = thread::Builder::new().name("sampler".into()).spawn(sample)?;
        Ok(Self { process, started, samples, ended, thread: Some(thread) })
    }

    /// Seconds since the sampling was started.
    pub fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Memory at this moment.
    pub fn memory(&self) -> Result<Memory> {
        memory_of(self.process)
    }

    /// Processor time used so far, user and system together, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.process);
        let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}: has the process ended?"))?;
        let ticks = cpu_ticks(&stat).with_context(|| format!("{path} has no processor times"))?;
        // SAFETY: sysconf reads a constant of the system.
        Ok(ticks as f64 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64)
    }

    /// All samples from `seconds` on.
    pub fn samples_from(&self, seconds: f64) -> Vec<Sample> {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.iter().copied().filter(|sample| sample.seconds >= seconds).collect()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Has Linux forget the most that was ever resident of a process of this user, but for what is resident now.
pub fn forget_peak(process: u32) -> Result<()> {
    let path = format!("/proc/{process}/clear_refs");
    // proc(5): 5 resets the peak resident set size.
    fs::write(&path, "5").with_context(|| format!("cannot write {path}: has the process ended?"))
}

/// The most that was resident of a process since its start or since [`forget_peak`], in MiB. Unlike samples, which are apart
/// in time, it has what was there for a moment only.
pub fn peak_rss_mib(process: u32) -> Result<f64> {
    let (path, status) = status(process)?;
    mib_in(&status, "VmHWM").with_context(|| format!("{path} has no VmHWM"))
}

/// The most of each figure, which need not be of the same moment.
pub fn peak(samples: &[Sample]) -> Option<Memory> {
    samples.iter().map(|sample| sample.memory).reduce(|left, right| Memory {
        rss_mib: left.rss_mib.max(right.rss_mib),
        anonymous_mib: left.anonymous_mib.max(right.anonymous_mib),
    })
}

fn memory_of(process: u32) -> Result<Memory> {
    let (path, status) = status(process)?;
    memory_in(&status).with_context(|| format!("{path} has no VmRSS and RssAnon"))
}

/// The status of a process, with its path.
fn status(process: u32) -> Result<(String, String)> {
    let path = format!("/proc/{process}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}: has the process ended?"))?;
    Ok((path, status))
}

fn memory_in(status: &str) -> Option<Memory> {
    Some(Memory { rss_mib: mib_in(status, "VmRSS")?, anonymous_mib: mib_in(status, "RssAnon")? })
}

fn mib_in(status: &str, name: &str) -> Option<f64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().strip_suffix(" kB")?.parse::<f64>().ok()? / 1024.0)
}

/// Fields 14 and 15 of proc(5)'s stat. The command, field 2, may hold spaces and brackets.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_mib() {
        let status = "Name:\twrite-api\nVmHWM:\t  99999 kB\nVmRSS:\t   24576 kB\nRssAnon:\t   10240 kB\n";
        assert_eq!(memory_in(status), Some(Memory { rss_mib: 24.0, anonymous_mib: 10.0 }));
        assert_eq!(memory_in("Name:\tgone\n"), None);
    }

    #[test]
    fn a_command_with_brackets_does_not_move_the_fields() {
        let stat = "17 (a ) b) S 1 17 17 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 5 0 100 0 0";
        assert_eq!(cpu_ticks(stat), Some(300));
    }

    #[test]
    fn a_peak_of_a_moment_is_told_until_it_is_forgotten() -> Result<()> {
        let process = std::process::id();
        drop(std::hint::black_box(vec![1_u8; 64 << 20]));
        let peak = peak_rss_mib(process)?;
        assert!(peak >= 64.0, "{peak}");
        // Other tests hold memory as well, but less than that.
        forget_peak(process)?;
        let forgotten = peak_rss_mib(process)?;
        assert!(forgotten <= peak - 32.0, "{forgotten} after {peak}");
        Ok(())
    }

    #[test]
    fn this_process_is_sampled() -> Result<()> {
        let sampler = Sampler::start(std::process::id())?;
        while sampler.samples_from(0.0).len() < 2 {
            thread::sleep(INTERVAL / 10);
        }
        let peak = peak(&sampler.samples_from(0.0)).expect("samples");
        assert!(peak.rss_mib >= peak.anonymous_mib && peak.anonymous_mib > 0.0, "{peak:?}");
        assert!(sampler.cpu_seconds()? >= 0.0);
        Ok(())
    }
}
