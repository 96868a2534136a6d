//! The end of a process whose clients still have threads.

use std::process::Command;

use super::*;

const THERE: &str = "OpenSSL is there until the end";

/// Called when the process ends, after everything that was registered later: OpenSSL's own cleaning, if there is one.
extern "C" fn at_the_end() {
    // SAFETY: it takes no settings; once OpenSSL has cleaned up it does nothing and returns 0.
    if unsafe { openssl_sys::OPENSSL_init_ssl(0, std::ptr::null()) } == 1 {
        println!("{THERE}");
    }
}

#[test]
#[ignore = "the process of the next one"]
fn a_process_that_has_a_client() {
    // SAFETY: the function lives as long as the process.
    assert_eq!(unsafe { libc::atexit(at_the_end) }, 0);
    let (_cluster, mut kafka) = cluster();
    // Without it librdkafka does not start OpenSSL.
    kafka.tls = Some(config::KafkaTls { ca_file: None, client: None });
    std::mem::forget(publisher(&kafka));
}

/// librdkafka's threads live until the process is gone, and one may be in the middle of a handshake.
#[test]
fn openssl_is_not_taken_from_threads_that_live() {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "--nocapture", "kafka::tests::ending::a_process_that_has_a_client"])
        .output()
        .expect("a process");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed") && said.contains(THERE), "{}: {said}", child.status);
}
