//! The emulator of AWS's services (PyPI `ministack`), a process for each service that is wanted.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{Ending, Process};
use crate::python::Virtualenv;
use crate::{http_client, machine};

/// The emulator is young: another version is another behaviour.
const PACKAGE: &str = "ministack==1.5.33";
/// From the start of the emulator to its first answer.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Starts an emulator of one service, whose files are below `scratch`. Gives its endpoint URL as well.
pub(crate) async fn start(scratch: &Path, service: &str) -> Result<(Process, String)> {
    let environment = Virtualenv::with(PACKAGE).await?;
    let home = scratch.join(service);
    fs::create_dir(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let port = machine::free_port()?;
    let endpoint = format!("http://127.0.0.1:{port}");

    let mut command = Command::new(environment.python());
    command.args(["-m", "ministack"]).current_dir(&home);
    // Only what is named here: variables meant for other emulators would change what this one does.
    command.env_clear().env("HOME", &home).env("TMPDIR", &home).env("PYTHONUNBUFFERED", "1");
    command.env("GATEWAY_PORT", port.to_string()).env("BIND_HOST", "127.0.0.1").env("MINISTACK_HOST", "127.0.0.1");
    command.env("SERVICES", service).env("LOG_LEVEL", "WARNING");
    // It emulates much else. Two of those would listen on ports of their own, and one removes containers from the
    // machine's Docker when it starts.
    command.env("SFTP_ENABLED", "0").env("IOT_MTLS_ENABLED", "0").env("DOCKER_HOST", "unix:///nonexistent");
    let (name, log) = (format!("the {} emulator", service.to_uppercase()), scratch.join(format!("{service}.log")));
    let process = Process::spawn(&name, command, &log, None, Ending::AT_ONCE)?;

    let health = format!("{endpoint}/_ministack/health");
    let probe = async || http_client::get(&health).await.ok().filter(|(status, _)| status.is_success());
    process.ready(START_LIMIT, probe).await?;
    Ok((process, endpoint))
}
