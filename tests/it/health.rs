//! `write-api health`, as a container's health check runs it: beside the service, with the same settings.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use local_stack::Behaviour;

use crate::harness::{World, text};

fn said(output: &Output, code: i32, on_stdout: &str, on_stderr: &str) -> Result<()> {
    let as_expected = output.status.code() == Some(code)
        && text(&output.stdout).contains(on_stdout)
        && text(&output.stderr).contains(on_stderr);
    ensure!(as_expected, "not {code}, {on_stdout:?} and {on_stderr:?}: {output:?}");
    Ok(())
}

#[tokio::test]
async fn a_service_that_works_is_healthy_and_one_that_hangs_or_is_gone_is_not() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let service = world.serve().await?;
    let address = service.admin_url().trim_start_matches("http://").to_owned();
    world.set("admin.listen", &address);
    said(&world.cli(&["health"])?, 0, r#""status":"ok""#, "")?;
    // As in a container, where it listens on every address.
    world.set("admin.listen", address.replace("127.0.0.1", "0.0.0.0"));
    said(&world.cli(&["health"])?, 0, r#""status":"ok""#, "")?;

    service.signal(libc::SIGSTOP);
    let begin = Instant::now();
    let output = world.cli(&["health"])?;
    service.signal(libc::SIGCONT);
    said(&output, 1, "", "no answer within 2s")?;
    ensure!(begin.elapsed() < Duration::from_secs(10), "it took {:?}", begin.elapsed());

    world.finish(service).await?;
    said(&world.cli(&["health"])?, 1, "", &address)
}

#[tokio::test]
async fn what_the_page_says_is_shown_when_it_is_bad_news() -> Result<()> {
    let mut world = World::bare(1, Behaviour::default()).await?;
    for (answer, on_stdout, on_stderr) in [
        ("HTTP/1.0 503 Service Unavailable\r\n\r\nthe keeper stands still\n", "the keeper stands still", "answers 503"),
        ("SSH-2.0-server\r\n", "", "speaks no HTTP"),
        ("", "", "speaks no HTTP"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        world.set("admin.listen", listener.local_addr()?);
        let server = std::thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut request = [0; 1024];
            let length = stream.read(&mut request)?;
            assert!(request[..length].starts_with(b"GET /livez HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes())
        });
        said(&world.cli(&["health"])?, 1, on_stdout, on_stderr)?;
        server.join().expect("the request was as expected")?;
    }
    Ok(())
}
