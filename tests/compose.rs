//! The images and docker-compose.yml, by `tests/compose/run`: where a Docker engine answers, the whole of it; elsewhere
//! nothing, and the reason is printed.

use std::path::Path;
use std::process::Command;

/// How the script says that it cannot be run on this machine.
const SKIPPED: i32 = 77;

#[test]
fn everything_comes_up_and_does_its_work_in_containers() {
    let program = Path::new(env!("CARGO_BIN_EXE_write-api"));
    local_stack::workspace_binary("local-stack").expect("the partner stub is built");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compose/run");
    // Its output goes past the test's: why it was skipped, and what was no real image, must be seen of a passed test too.
    let mut run = Command::new(script);
    run.arg("--binaries").arg(program.parent().expect("a directory"));
    let status = run.status().expect("bash runs the script");
    assert!(status.success() || status.code() == Some(SKIPPED), "tests/compose/run: {status}; the reason is above");
}
