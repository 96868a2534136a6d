//! The command line: exit codes, errors that say what to do.

use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::QueueAttributeName;
use local_stack::Behaviour;
use serde_json::Value;

use crate::harness::{LANES, Lane, World, text};

const DONE: i32 = 0;
const FAILED: i32 = 1;
const USAGE: i32 = 64;
const CONFIGURATION: i32 = 78;

/// The program in an environment with these settings and no others.
fn program(arguments: &[&str], settings: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_write-api"));
    command.args(arguments).env_clear().envs(settings.iter().copied());
    Ok(command.output()?)
}

/// Checks the exit code; the output is shown where it differs.
fn ended(output: &Output, code: i32) -> Result<()> {
    ensure!(output.status.code() == Some(code), "{} instead of {code}: {output:?}", output.status);
    Ok(())
}

#[test]
fn help_is_there_for_every_verb_and_wrong_usage_is_told_apart_from_failure() -> Result<()> {
    for arguments in ["--help", "--version", "serve --help", "check -h", "config --help", "completions --help"] {
        let output = program(&arguments.split(' ').collect::<Vec<_>>(), &[])?;
        ended(&output, DONE)?;
        ensure!(!output.stdout.is_empty() && output.stderr.is_empty(), "{arguments}: {output:?}");
    }
    let help = text(&program(&["--help"], &[])?.stdout);
    for verb in [
        "serve",
        "check",
        "config",
        "migrate",
        "setup",
        "seed",
        "send",
        "replay",
        "status",
        "cancel",
        "retry",
        "profile",
        "completions",
    ] {
        ensure!(help.lines().any(|line| line.trim_start().starts_with(verb)), "{verb} is not in\n{help}");
    }
    for kind in ["refresh", "publish", "upsert"] {
        ended(&program(&["send", kind, "--help"], &[])?, DONE)?;
    }
    for wrong in [
        "",
        "dance",
        "serve --fast",
        "seed --count many",
        "check --yaml",
        "completions tcsh",
        "send",
        "send refresh --limit -1",
        "send refresh --time yesterday",
        "send upsert",
        "send publish",
        "status --limit 0",
        "status some-run --limit 5",
        "cancel",
        "retry",
        "serve --record-limit 5",
        "replay",
        "replay x --rate 0",
        "replay x --speed 0",
        "replay x --rate 1 --speed 1",
        "replay x --dry-run --resume",
        "replay - -",
        "replay - --resume",
        "profile",
        "profile diff one.pb.gz",
        "profile fetch --mode everything",
        "profile grew --count 1",
    ] {
        let output = program(&wrong.split_whitespace().collect::<Vec<_>>(), &[])?;
        ended(&output, USAGE)?;
        ensure!(output.stdout.is_empty() && !output.stderr.is_empty(), "{wrong:?}: {output:?}");
    }
    Ok(())
}

#[test]
fn every_error_of_the_configuration_is_told_at_once() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("write-api.toml");
    fs::write(&file, "[queue]\nvisibility_timeout = \"1s\"\nmax_pols = 3\n[log]\nformat = \"yaml\"\n")?;
    let file = file.to_str().context("a path in UTF-8")?;
    let settings = [
        ("WRITE_API_PARTNER_BASE_URL", "ftp://partner"),
        ("WRITE_API_PARTNER_IN_FLIGHT", "none"),
        ("WRITE_API_PROFILING_LISTEN", "0.0.0.0:6060"),
        ("WRITE_API_QUEUE_WAIT_TIEM", "20s"),
        ("WRITE_API_LANES_EVENTS_QUEUE", "events.fifo"),
    ];
    let output = program(&["serve", "--config", file], &settings)?;
    ended(&output, CONFIGURATION)?;
    let errors = text(&output.stderr);
    // What is wrong, where it was said, what to do.
    for [key, source, fix] in [
        ["queue.visibility_timeout", file, "give a duration from 2s"],
        ["queue.max_pols", file, "queue.max_polls"],
        ["log.format", file, "auto, json, pretty"],
        ["partner.base_url", "WRITE_API_PARTNER_BASE_URL", "http://HOST"],
        ["partner.in_flight", "WRITE_API_PARTNER_IN_FLIGHT", "from 1 to 100000"],
        ["profiling.listen", "WRITE_API_PROFILING_LISTEN", "profiling.token_file"],
        ["WRITE_API_QUEUE_WAIT_TIEM", "WRITE_API_QUEUE_WAIT_TIEM", "WRITE_API_QUEUE_WAIT_TIME"],
        ["lanes.events.queue", "WRITE_API_LANES_EVENTS_QUEUE", "standard queue"],
        ["database.url", "is missing", "WRITE_API_DATABASE_URL"],
        ["kafka.brokers", "is missing", "WRITE_API_KAFKA_BROKERS"],
    ] {
        let line = errors.lines().find(|line| line.trim_start().starts_with(key));
        let line = line.with_context(|| format!("{key} is not told:\n{errors}"))?;
        ensure!(line.contains(source) && line.contains(fix), "{source:?} and {fix:?} should be in: {line}");
    }
    ensure!(errors.lines().count() == 11, "ten errors and a headline:\n{errors}");

    let missing = directory.path().join("nowhere.toml");
    let by_variable = program(&["migrate"], &[("WRITE_API_CONFIG", missing.to_str().context("UTF-8")?)])?;
    ended(&by_variable, CONFIGURATION)?;
    ensure!(text(&by_variable.stderr).contains("nowhere.toml: cannot be read"), "{by_variable:?}");
    ended(&program(&["config"], &[("WRITE_API_CONFIG", "")])?, 0)?;
    Ok(())
}

#[test]
fn config_prints_every_setting_with_its_source_also_where_some_are_wrong() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("write-api.toml");
    fs::write(&file, "[queue]\nmax_polls = 3\n")?;
    let file = file.to_str().context("a path in UTF-8")?;
    let mut settings =
        vec![("WRITE_API_DATABASE_URL", "postgres://app:hunter2@db:5432/homes"), ("WRITE_API_CONFIG", file)];
    let output = program(&["config"], &settings)?;
    ended(&output, DONE)?;
    let list = text(&output.stdout);
    let fields = |list: &str, key: &str| -> Result<Vec<String>> {
        let line = list.lines().find(|line| line.split(' ').next() == Some(key));
        let line = line.with_context(|| format!("{key} is not in\n{list}"))?;
        Ok(line.split("  ").map(str::trim).filter(|field| !field.is_empty()).map(str::to_owned).collect())
    };
    ensure!(fields(&list, "queue.max_polls")? == ["queue.max_polls", "3", &format!("file {file}")]);
    ensure!(fields(&list, "log.level")? == ["log.level", "info", "the default"]);
    let database = ["database.url", "app@db:5432/homes", "environment variable WRITE_API_DATABASE_URL"];
    ensure!(fields(&list, "database.url")? == database, "{list}");

    settings.push(("WRITE_API_QUEUE_WAIT_TIME", "soon"));
    let wrong = program(&["config"], &settings)?;
    ended(&wrong, CONFIGURATION)?;
    ensure!(fields(&text(&wrong.stdout), "queue.wait_time")?[1] == "soon");
    ensure!(text(&wrong.stderr).contains("queue.wait_time: \"soon\" is not a duration"), "{wrong:?}");
    ensure!(!format!("{output:?}{wrong:?}").contains("hunter2"));

    let manual = program(&["config", "--markdown"], &settings)?;
    ended(&manual, DONE)?;
    ensure!(text(&manual.stdout).contains("| `queue.max_polls`<br>`WRITE_API_QUEUE_MAX_POLLS` | `8` | 1 to 32 |"));
    Ok(())
}

#[test]
fn a_shell_completes_verbs_and_options() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        // A wrong configuration must not break a shell that starts.
        let output = program(&["completions", shell], &[("WRITE_API_NONSENSE", "1")])?;
        ended(&output, DONE)?;
        let script = text(&output.stdout);
        for word in ["serve", "check", "completions", "visibility_timeout"] {
            ensure!(script.contains(word) == (word != "visibility_timeout"), "{word}: {script}");
        }
    }
    let directory = tempfile::tempdir()?;
    let script = directory.path().join("write-api.bash");
    fs::write(&script, program(&["completions", "bash"], &[])?.stdout)?;
    let complete = |words: &str| -> Result<Vec<String>> {
        let program = format!(
            r#"source "$1"; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            _write__api write-api "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
            printf '%s\n' "${{COMPREPLY[@]}}""#
        );
        let output = Command::new("bash").args(["--norc", "-c", &program, "bash"]).arg(&script).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(text(&output.stdout).lines().map(str::to_owned).collect())
    };
    ensure!(complete("write-api se")? == ["serve", "setup", "seed", "send"], "{:?}", complete("write-api se")?);
    ensure!(complete("write-api check --j")? == ["--json"], "{:?}", complete("write-api check --j")?);
    Ok(())
}

#[tokio::test]
async fn setup_makes_what_is_missing_and_leaves_alone_what_is_there() -> Result<()> {
    let world = World::bare(1, Behaviour::default()).await?;
    let first = world.done(&["setup"])?;
    ensure!(first.matches("created").count() == LANES.len(), "{first}");
    for lane in LANES {
        let name = world.queue_name(lane);
        let dead_name = format!("{name}-dlq");
        let (queue, dead) = (attributes(&world, name).await?, attributes(&world, &dead_name).await?);
        let redrive: Value = serde_json::from_str(&queue(QueueAttributeName::RedrivePolicy)?)?;
        ensure!(redrive["deadLetterTargetArn"] == dead(QueueAttributeName::QueueArn)?, "{redrive}");
        ensure!(redrive["maxReceiveCount"].to_string().trim_matches('"') == "1000", "{redrive}");
        ensure!(queue(QueueAttributeName::VisibilityTimeout)? == "5");
        for retention in [&queue, &dead].map(|of| of(QueueAttributeName::MessageRetentionPeriod)) {
            ensure!(retention? == (14 * 24 * 3600).to_string());
        }
    }
    let unexplained: Vec<String> = sqlx::query_scalar(
        "SELECT format('%s.%s', table_name, column_name) FROM information_schema.columns
         WHERE table_schema = 'public' AND table_name <> '_sqlx_migrations'
           AND col_description(format('%I.%I', table_schema, table_name)::regclass, ordinal_position) IS NULL",
    )
    .fetch_all(&world.database)
    .await?;
    ensure!(unexplained.is_empty(), "columns without a comment in the migrations: {unexplained:?}");

    // What an operator changed, and what producers have sent, is not touched.
    let world = world.with_queues().await?;
    let url = world.sqs.get_queue_url().queue_name(world.queue_name(Lane::Events)).send().await?;
    let url = url.queue_url().context("a URL")?;
    let longer = world.sqs.set_queue_attributes().queue_url(url);
    longer.attributes(QueueAttributeName::VisibilityTimeout, "77").send().await?;
    world.put(Lane::Events, "waiting").await?;
    world.listings(10).await?;
    let second = world.done(&["setup"])?;
    ensure!(!second.contains("created") && second.matches("there").count() >= LANES.len(), "{second}");
    let queue = attributes(&world, world.queue_name(Lane::Events)).await?;
    ensure!(queue(QueueAttributeName::VisibilityTimeout)? == "77");
    ensure!(world.depth(Lane::Events).await? == (1, 0));
    ensure!(world.number("SELECT count(*) FROM listings").await? == 10);

    // One queue lost: one queue made.
    world.sqs.delete_queue().queue_url(url).send().await?;
    let third = world.done(&["setup"])?;
    let created: Vec<&str> = third.lines().filter(|line| line.starts_with("created")).collect();
    ensure!(created == [format!("created {}", world.queue_name(Lane::Events))], "{third}");
    Ok(())
}

/// The attributes of a queue, by name.
async fn attributes(world: &World, name: &str) -> Result<impl Fn(QueueAttributeName) -> Result<String> + use<>> {
    let found = world.sqs.get_queue_url().queue_name(name).send().await?;
    let url = found.queue_url().context("a URL")?;
    let asked = world.sqs.get_queue_attributes().queue_url(url).attribute_names(QueueAttributeName::All);
    let attributes = asked.send().await?.attributes.unwrap_or_default();
    let name = name.to_owned();
    Ok(move |attribute: QueueAttributeName| {
        attributes.get(&attribute).cloned().with_context(|| format!("{name} has no {attribute}"))
    })
}

#[tokio::test]
async fn seeding_again_adds_what_is_missing_only() -> Result<()> {
    let world = World::bare(1, Behaviour::default()).await?;
    let without_schema = world.cli(&["seed", "--count", "10"])?;
    ended(&without_schema, FAILED)?;
    ensure!(text(&without_schema.stderr).contains("write-api migrate"), "{without_schema:?}");

    for _ in 0..2 {
        world.done(&["migrate"])?;
    }
    ensure!(world.done(&["seed", "--count", "100"])? == "100 listings loaded, 0 were there");
    world.sql("UPDATE listings SET list_price_cents = 1 WHERE listing_id = 1000102").await?;
    ensure!(world.done(&["seed", "--count", "1500"])? == "1400 listings loaded, 100 were there");
    ensure!(world.done(&["seed", "--count", "1500"])? == "0 listings loaded, 1500 were there");
    ensure!(world.number("SELECT list_price_cents FROM listings WHERE listing_id = 1000102").await? == 1);
    // Wide, as real listings are.
    let wide = "SELECT count(*) FROM listings WHERE length(description) >= 1400 AND length(attributes::text) >= 350";
    ensure!(world.number(wide).await? == 1_500);
    Ok(())
}

#[tokio::test]
async fn a_verb_that_cannot_do_its_work_says_why() -> Result<()> {
    let mut world = World::bare(1, Behaviour::default()).await?;
    let no_queue = world.cli(&["send", "refresh"])?;
    ended(&no_queue, FAILED)?;
    let said = text(&no_queue.stderr);
    ensure!(said.contains(world.queue_name(Lane::Events)) && said.contains("write-api setup"), "{said}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    world.set("admin.listen", &address);
    let no_port = world.cli(&["serve"])?;
    ended(&no_port, FAILED)?;
    let said = text(&no_port.stderr);
    ensure!(said.contains("admin.listen") && said.contains(&address), "{said}");

    world.set("database.url", "postgres://postgres@127.0.0.1:1/nowhere").set("database.acquire_timeout", "300ms");
    let no_database = world.cli(&["migrate"])?;
    ended(&no_database, FAILED)?;
    ensure!(!no_database.stderr.is_empty(), "{no_database:?}");
    Ok(())
}
