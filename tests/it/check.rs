//! `check`: each way in which a world can be broken is named, with what to do, and told apart by the exit code.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::QueueAttributeName;
use local_stack::Behaviour;
use local_stack::wire::{Flow, Wire};
use serde_json::Value;

use crate::harness::{LANES, LONG, Lane, World, text};

const DONE: i32 = 0;
const FAILED: i32 = 1;
const CONFIGURATION: i32 = 78;

/// A port of loopback on which nobody listens.
const NOBODY: &str = "127.0.0.1:1";

/// One line of the report.
#[derive(Debug)]
struct Finding {
    status: String,
    name: String,
    /// What was found and what to do.
    text: String,
}

/// What `check --json` says, and its exit code.
fn check(mut command: Command, settings: Settings<'_>) -> Result<(i32, Vec<Finding>)> {
    let variable = |key: &str| match key.contains('.') {
        true => format!("WRITE_API_{}", key.replace('.', "_").to_uppercase()),
        false => key.to_owned(),
    };
    command.args(["check", "--json"]).envs(settings.iter().map(|(key, value)| (variable(key), value)));
    let output = command.output()?;
    let code = output.status.code().with_context(|| format!("{output:?}"))?;
    let document: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    ensure!(document["ok"] == (code == DONE), "{code}: {document:#}");
    let part = |finding: &Value, part: &str| finding[part].as_str().unwrap_or_default().to_owned();
    let findings = document["checks"].as_array().context("no findings")?.iter().map(|finding| Finding {
        status: part(finding, "status"),
        name: part(finding, "name"),
        text: format!("{}; {}", part(finding, "found"), part(finding, "fix")),
    });
    Ok((code, findings.collect()))
}

/// Settings that differ from the world's, by key or, where there is no key, by variable.
type Settings<'a> = &'a [(&'a str, &'a str)];

/// Status and name of a finding, and words of what is told about it.
type Told<'a> = (&'a str, &'a str, &'a [&'a str]);

/// Checks that exactly the named things are not ok, each told with these words, and that the exit code follows.
fn expect(case: &str, (code, findings): (i32, Vec<Finding>), wanted: &[Told<'_>]) -> Result<()> {
    let odd: Vec<&Finding> = findings.iter().filter(|finding| finding.status != "ok").collect();
    for (status, name, words) in wanted {
        let told = odd.iter().any(|finding| {
            finding.status == *status && finding.name == *name && words.iter().all(|word| finding.text.contains(word))
        });
        ensure!(told, "{case}: {status} {name} with {words:?} is not told: {odd:#?}");
    }
    ensure!(odd.len() == wanted.len(), "{case}: told are {odd:#?}");
    let failed = wanted.iter().any(|(status, ..)| *status == "fail");
    ensure!(code == if failed { FAILED } else { DONE }, "{case}: exit code {code}");
    Ok(())
}

#[test]
fn every_wrong_setting_is_named_with_its_source_and_the_fix() -> Result<()> {
    const SECRET: &str = "hunter2-hunter2";
    let directory = tempfile::tempdir()?;
    let file = |name: &str, content: &str| -> Result<String> {
        let path = directory.path().join(name);
        std::fs::write(&path, content)?;
        Ok(path.to_str().context("a path in UTF-8")?.to_owned())
    };
    let nowhere = directory.path().join("nowhere").display().to_string();
    let empty = file("empty", " \n")?;
    let unknown_key = file("unknown.toml", "[queue]\nwait_tiem = \"5s\"\n")?;
    let no_toml = file("bad.toml", &format!("[log]\n[database]\nurl = \"postgres://app:{SECRET}@localhost/app\n"))?;
    let table = file("table.toml", "[queue]\nmax_polls = [1, 2]\n")?;
    let with_password = format!("https://app:{SECRET}@partner.example");
    let other_database = format!("mysql://app:{SECRET}@localhost/app");
    let wrong_port = format!("postgres://app:{SECRET}@localhost:port/app");
    let slash = format!("postgres://app:1/{SECRET}@localhost/app");
    let (bad, not_there) = (no_toml.as_str(), nowhere.as_str());

    let cases: &[(Settings<'_>, &str, &[&str])] = &[
        (&[("queue.wait_time", "30s")], "queue.wait_time", &["\"30s\"", "WRITE_API_QUEUE_WAIT_TIME", "1s to 20s"]),
        (&[("queue.wait_time", "20")], "queue.wait_time", &["not a duration", "\"250ms\""]),
        (&[("queue.visibility_timeout", "2500ms")], "queue.visibility_timeout", &["whole seconds"]),
        (&[("queue.receive_cap", "soon")], "queue.receive_cap", &["\"soon\"", "2s to 11h58m"]),
        (&[("queue.receive_cap", "30s")], "queue.receive_cap", &["not longer", "make it longer"]),
        (&[("partner.in_flight", "many")], "partner.in_flight", &["\"many\"", "from 1 to 100000"]),
        (&[("partner.request_timeout", "9m")], "partner.total_timeout", &["shorter than 8 tries"]),
        (&[("partner.base_url", "ftp://partner")], "partner.base_url", &["ftp://partner", "http://HOST:PORT"]),
        (&[("partner.base_url", &with_password)], "partner.base_url", &["a password"]),
        (&[("partner.base_url", "")], "partner.base_url", &["is missing", "WRITE_API_PARTNER_BASE_URL"]),
        (&[("partner.credential_header", "X-Key")], "partner.credential_file", &["is missing", "or empty"]),
        (&[("partner.credential_file", &empty)], "partner.credential_header", &["is missing", "or empty"]),
        (
            &[("partner.credential_header", "X-Key"), ("partner.credential_file", not_there)],
            "partner.credential_file",
            &["nowhere", "cannot be read", "name a readable file"],
        ),
        (&[("kafka.brokers", "")], "kafka.brokers", &["is missing", "WRITE_API_KAFKA_BROKERS"]),
        (&[("kafka.compression", "zip")], "kafka.compression", &["\"zip\"", "none, lz4"]),
        (&[("database.url", "")], "database.url", &["is missing", "database.url_file"]),
        (&[("database.url", &other_database)], "database.url", &["not a Postgres URL", "postgres://USER"]),
        (&[("database.url", &wrong_port)], "database.url", &["not a Postgres URL"]),
        (&[("database.url", &slash)], "database.url", &["%2F"]),
        (&[("database.url_file", &empty)], "database.url_file", &["so is database.url", "only one"]),
        (&[("lanes.events.queue", "events.fifo")], "lanes.events.queue", &["FIFO", "standard queue"]),
        (&[("lanes.events.queue", "a b")], "lanes.events.queue", &["not a queue name"]),
        (&[("lanes.events.queue", "writeapi-valuations")], "lanes.valuations.queue", &["two lanes share a queue"]),
        (&[("profiling.listen", "0.0.0.0:6060")], "profiling.listen", &["no token", "profiling.token_file"]),
        (&[("profiling.listen", "localhost")], "profiling.listen", &["not an address", "IP:PORT"]),
        (&[("profiling.token", "short")], "profiling.token", &["5 characters", "at least 16"]),
        (&[("profiling.token_file", not_there)], "profiling.token_file", &["cannot be read", "readable file"]),
        (&[("profiling.token_file", &empty)], "profiling.token_file", &["is empty", "write the secret"]),
        (&[("profiling.enabled", "yes")], "profiling.enabled", &["neither true nor false"]),
        (&[("log.level", "loud=very")], "log.level", &["not a filter", "info"]),
        (&[("queue.wait_tiem", "5s")], "WRITE_API_QUEUE_WAIT_TIEM", &["not a known", "WRITE_API_QUEUE_WAIT_TIME"]),
        (&[("WRITE_API_CONFIG", &unknown_key)], "queue.wait_tiem", &["unknown.toml", "queue.wait_time"]),
        (&[("WRITE_API_CONFIG", &table)], "queue.max_polls", &["of type array", "give one value"]),
        (&[("WRITE_API_CONFIG", bad)], bad, &["not valid TOML in line 3", "mend the file"]),
        (&[("WRITE_API_CONFIG", not_there)], not_there, &["cannot be read", "--config"]),
    ];
    for (settings, name, words) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_write-api"));
        command.env_clear().envs([
            ("WRITE_API_DATABASE_URL", "postgres://app@localhost/app"),
            ("WRITE_API_PARTNER_BASE_URL", "http://localhost:9000"),
            ("WRITE_API_KAFKA_BROKERS", "localhost:9092"),
        ]);
        let (code, findings) = check(command, settings)?;
        ensure!(!format!("{findings:?}").contains(SECRET), "{settings:?}: {findings:?}");
        ensure!(code == CONFIGURATION, "{settings:?}: {code}");
        expect(&format!("{settings:?}"), (FAILED, findings), &[("fail", name, words)])?;
    }
    ensure!(cases.len() >= 20);
    Ok(())
}

#[tokio::test]
async fn a_world_that_was_set_up_is_good_and_nothing_in_it_is_changed() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    world.listings(10).await?;
    let output = world.command().arg("check").env("TMPDIR", "/nonexistent").output()?;
    let lines = text(&output.stdout);
    ensure!(output.status.code() == Some(DONE) && output.stderr.is_empty(), "{output:?}");
    ensure!(lines.lines().count() == 13 && lines.lines().all(|line| line.starts_with("ok    ")), "{lines}");
    ensure!(lines.contains("may do all that the service does") && lines.contains("with 12 partitions"), "{lines}");

    for lane in LANES {
        ensure!(world.depth(lane).await? == (0, 0));
    }
    ensure!(world.partner.stats().requests == 0, "the partner was called");
    ensure!(world.number("SELECT count(*) FROM listings").await? == 10);
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_with_a_queue_is_named_with_the_value_to_set() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let name = world.queue_name(Lane::Events);
    let (queue, dead) = (format!("queue {name}"), format!("queue {name}-dlq"));
    let url = async |name: &str| -> Result<String> {
        let found = world.sqs.get_queue_url().queue_name(name).send().await?;
        found.queue_url.context("a URL")
    };
    let set = async |name: &str, attribute: QueueAttributeName, value: &str| -> Result<()> {
        let request = world.sqs.set_queue_attributes().queue_url(url(name).await?);
        request.attributes(attribute, value).send().await.map(drop).context("SetQueueAttributes")
    };
    let all = async |name: &str| -> Result<_> {
        let request = world.sqs.get_queue_attributes().queue_url(url(name).await?);
        let answer = request.attribute_names(QueueAttributeName::All).send().await?;
        answer.attributes.context("attributes")
    };
    let dead_name = format!("{name}-dlq");
    let good = all(name).await?;
    let policy = good[&QueueAttributeName::RedrivePolicy].clone();
    let other_arn = all(world.queue_name(Lane::Valuations)).await?[&QueueAttributeName::QueueArn].clone();
    let other_policy = format!(r#"{{"deadLetterTargetArn":"{other_arn}","maxReceiveCount":"1000"}}"#);
    let small_policy = policy.replace("1000", "5");
    ensure!(small_policy != policy, "{policy}");

    use QueueAttributeName::{MessageRetentionPeriod, RedrivePolicy, VisibilityTimeout};
    let fortnight = "1209600";
    type Case<'a> = (&'a str, QueueAttributeName, &'a str, &'a str, Told<'a>);
    let cases: [Case<'_>; 5] = [
        (name, MessageRetentionPeriod, "345600", fortnight, ("fail", &queue, &["345600 s", "to 1209600"])),
        (&dead_name, MessageRetentionPeriod, "60", fortnight, ("fail", &dead, &["60 s", "to 1209600"])),
        (name, RedrivePolicy, &small_policy, &policy, ("fail", &queue, &["is 5", &policy])),
        (name, RedrivePolicy, &other_policy, &policy, ("fail", &queue, &[&other_arn, &policy])),
        (name, VisibilityTimeout, "77", "5", ("warn", &queue, &["77 s", "at each receive", "set it to 5"])),
    ];
    for (name, attribute, broken, mended, wanted) in cases {
        set(name, attribute.clone(), broken).await?;
        expect(&format!("{attribute} = {broken}"), check(world.command(), &[])?, &[wanted])?;
        set(name, attribute, mended).await?;
    }
    expect("mended", check(world.command(), &[])?, &[])?;

    let missing: &[&str] = &["does not exist", "write-api setup", "lanes.events.queue"];
    world.sqs.delete_queue().queue_url(url(&dead_name).await?).send().await?;
    expect("no dead-letter queue", check(world.command(), &[])?, &[("fail", &dead, missing)])?;
    world.sqs.delete_queue().queue_url(url(name).await?).send().await?;
    let both = [("fail", queue.as_str(), missing), ("fail", dead.as_str(), missing)];
    expect("no queue", check(world.command(), &[])?, &both)?;
    world.sqs.create_queue().queue_name(name).attributes(MessageRetentionPeriod, fortnight).send().await?;
    world.sqs.create_queue().queue_name(&dead_name).attributes(MessageRetentionPeriod, fortnight).send().await?;
    set(name, VisibilityTimeout, "5").await?;
    let no_policy: &[&str] = &["has no dead-letter queue", &policy];
    expect("no policy", check(world.command(), &[])?, &[("fail", &queue, no_policy)])?;

    let away = format!("http://{NOBODY}");
    let (_, findings) = check(world.command(), &[("aws.endpoint_url", &away)])?;
    let failed = findings.iter().filter(|finding| {
        finding.name.starts_with("queue ") && finding.status == "fail" && finding.text.contains("see aws.endpoint_url")
    });
    ensure!(failed.count() == 6, "{findings:#?}");
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_with_postgres_is_named_with_the_fix() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let url = world.environment().database_url().to_owned();
    let name = world.environment().names().database.clone();

    // Where it is and who asks.
    let away = format!("postgres://postgres@{NOBODY}/{name}");
    let unknown_user = url.replace("postgres@", "nobody_of_that_name@");
    let unknown_database = url.replace(&name, "no_database_of_that_name");
    let wrong_password = refusing_postgres()?;
    let wire = Wire::to(&url)?;
    wire.set(Flow::Stalled);
    let cases: [(&str, &[&str]); 5] = [
        (&away, &["Connection refused", "WRITE_API_DATABASE_URL"]),
        (&unknown_user, &["nobody_of_that_name", "correct the user or the password"]),
        (&unknown_database, &["no_database_of_that_name", "create the database"]),
        (&wrong_password, &["password authentication failed", "correct the user or the password"]),
        (wire.url(), &["no answer within 500ms", "see that Postgres runs"]),
    ];
    for (url, words) in cases {
        let settings = [("database.url", url), ("database.acquire_timeout", "500ms")];
        expect(url, check(world.command(), &settings)?, &[("fail", "database", words)])?;
    }

    // The schema. Each is mended by the second statement.
    let cases: [(&str, &str, Told<'_>); 5] = [
        (
            "CREATE TABLE kept AS SELECT * FROM _sqlx_migrations WHERE version = 3;
             DELETE FROM _sqlx_migrations WHERE version = 3",
            "INSERT INTO _sqlx_migrations SELECT * FROM kept; DROP TABLE kept",
            ("fail", "database schema", &["not applied: 0003_outbox", "write-api migrate"]),
        ),
        (
            "INSERT INTO _sqlx_migrations VALUES (9001, 'later', now(), true, '\\x00', 1)",
            "DELETE FROM _sqlx_migrations WHERE version = 9001",
            ("warn", "database schema", &["a newer version of the program: 9001"]),
        ),
        (
            "UPDATE _sqlx_migrations SET checksum = checksum || '\\x00' WHERE version = 2",
            "UPDATE _sqlx_migrations SET checksum = substr(checksum, 1, length(checksum) - 1) WHERE version = 2",
            ("fail", "database schema", &["another text than this program's: 0002_runs"]),
        ),
        (
            "UPDATE _sqlx_migrations SET success = false WHERE version = 3",
            "UPDATE _sqlx_migrations SET success = true WHERE version = 3",
            ("fail", "database schema", &["0003 failed half-way", "_sqlx_migrations"]),
        ),
        (
            "ALTER TABLE outbox RENAME TO elsewhere",
            "ALTER TABLE elsewhere RENAME TO outbox",
            ("fail", "database rights", &["outbox missing", "write-api migrate"]),
        ),
    ];
    for (broken, mended, wanted) in cases {
        world.sql(broken).await?;
        expect(broken, check(world.command(), &[])?, &[wanted])?;
        world.sql(mended).await?;
    }
    expect("mended", check(world.command(), &[])?, &[])?;

    world.sql(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on")).await?;
    let read_only: &[&str] = &["takes no writes", "name the primary"];
    expect("read-only", check(world.command(), &[])?, &[("fail", "database", read_only)])?;

    let empty = local_stack::shared().await?.postgres().create_database(&format!("{name}_empty")).await?;
    let nothing: [Told<'_>; 2] = [
        ("fail", "database schema", &["not applied: 0001_listings, 0002_runs, 0003_outbox", "write-api migrate"]),
        ("fail", "database rights", &["listings, runs, run_listings, valuations", "write-api migrate"]),
    ];
    expect("nothing migrated", check(world.command(), &[("database.url", &empty)])?, &nothing)
}

/// A server that takes no password, as Postgres tells it; gives its URL. The servers of the tests take any.
fn refusing_postgres() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut start = [0; 1024];
            // Without TLS, if that is asked for first.
            let length = stream.read(&mut start).unwrap_or(0);
            if length == 8 {
                let _ = stream.write_all(b"N");
                let _ = stream.read(&mut start);
            }
            let fields = b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user \"app\"\0\0";
            let _ = stream.write_all(b"E");
            let _ = stream.write_all(&(fields.len() as u32 + 4).to_be_bytes());
            let _ = stream.write_all(fields);
        }
    });
    Ok(format!("postgres://app:hunter2@{address}/app"))
}

#[tokio::test]
async fn the_rights_that_check_asks_for_are_enough_and_needed() -> Result<()> {
    let mut world = World::new(Behaviour::default()).await?;
    let user = format!("{}_user", world.environment().names().database);
    let url = world.environment().database_url().replace("postgres@", &format!("{user}@"));
    world.sql(&format!("CREATE ROLE {user} LOGIN")).await?;
    world.set("database.url", &url);

    // Every right alone: missing it is told, with the statement that gives it.
    let rights = [
        ("listings", &["SELECT", "INSERT", "UPDATE"][..]),
        ("runs", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("run_listings", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("valuations", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("listing_valuations", &["SELECT", "INSERT", "UPDATE"]),
        ("publications", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("quarantined_records", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("outbox", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("deliveries", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
        ("listing_events", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ];
    let (_, findings) = check(world.command(), &[])?;
    for (table, rights) in rights {
        let grant = format!("GRANT {} ON {table} TO \"{user}\"", rights.join(", "));
        ensure!(findings.iter().any(|finding| finding.text.contains(&grant)), "{grant} is not in {findings:#?}");
        world.sql(&grant).await?;
    }
    let unread: &[&str] = &["may not read which migrations", "GRANT SELECT ON _sqlx_migrations"];
    expect("all rights", check(world.command(), &[])?, &[("warn", "database schema", unread)])?;
    world.sql(&format!("GRANT SELECT ON _sqlx_migrations TO {user}")).await?;
    expect("all rights", check(world.command(), &[])?, &[])?;
    for (table, rights) in rights {
        for right in rights {
            world.sql(&format!("REVOKE {right} ON {table} FROM {user}")).await?;
            let grant = format!("GRANT {right} ON {table} TO \"{user}\"");
            let wanted: &[&str] = &[&grant];
            expect(&grant, check(world.command(), &[])?, &[("fail", "database rights", wanted)])?;
            world.sql(&grant).await?;
        }
    }

    // With these and no others the service does all that it does.
    let tap = world.environment().tap()?;
    world.done(&["seed", "--count", "10"])?;
    world.done(&["send", "upsert", "--sample", "5"])?;
    world.listings_between(1, 1_500).await?;
    let service = world.serve().await?;
    world.quiet(LONG).await?;
    let homes = world.homes(1_200).await?;
    let id = world.refresh(&["--limit", "1200"])?;
    world.published(&id, LONG).await?;
    world.check_run(&id, &homes).await?;
    world.check_records(&tap, &id, &homes).await?;
    world.finish(service).await
}

#[tokio::test]
async fn what_is_wrong_with_the_other_neighbours_is_named_with_the_fix() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let away = format!("http://{NOBODY}");
    let no_tls = world.partner.url().replace("http://", "https://");
    let cases: &[(Settings<'_>, Told<'_>)] = &[
        (&[("kafka.topic", "no-such-topic")], ("fail", "kafka", &["does not exist", "write-api setup"])),
        (&[("kafka.partitions", "13")], ("warn", "kafka", &["has 12 partitions", "kafka.partitions is 13"])),
        (&[("kafka.brokers", NOBODY)], ("fail", "kafka", &["no answer within 10s", "WRITE_API_KAFKA_BROKERS"])),
        (&[("partner.base_url", &away)], ("fail", "partner", &["refused", "WRITE_API_PARTNER_BASE_URL"])),
        (&[("partner.base_url", &no_tls)], ("fail", "partner", &["TLS"])),
        (
            &[("partner.base_url", "http://no-such-host.invalid")],
            ("fail", "partner", &["no-such-host.invalid:80", "does not resolve"]),
        ),
        (&[("MALLOC_CONF", "prof:false")], ("fail", "profiling", &["MALLOC_CONF", "profiling.enabled"])),
    ];
    for (settings, wanted) in cases {
        expect(&format!("{settings:?}"), check(world.command(), settings)?, &[*wanted])?;
    }
    for good in [("kafka.partitions", "11"), ("profiling.enabled", "false")] {
        expect(&format!("{good:?}"), check(world.command(), &[good])?, &[])?;
    }
    Ok(())
}

#[tokio::test]
async fn neighbours_that_hang_are_waited_for_together_and_not_for_ever() -> Result<()> {
    let world = World::new(Behaviour::default()).await?;
    let stalled = |url: &str| -> Result<Wire> {
        let wire = Wire::to(url)?;
        wire.set(Flow::Stalled);
        Ok(wire)
    };
    let (database, sqs) =
        (stalled(world.environment().database_url())?, stalled(local_stack::shared().await?.sqs().endpoint())?);
    let settings = [
        ("database.url", database.url()),
        ("database.acquire_timeout", "2s"),
        ("aws.endpoint_url", sqs.url()),
        ("queue.request_timeout", "2s"),
    ];
    let begin = Instant::now();
    let (code, findings) = check(world.command(), &settings)?;
    let took = begin.elapsed();
    let failed: Vec<&str> = findings.iter().filter(|f| f.status == "fail").map(|f| f.name.as_str()).collect();
    ensure!(code == FAILED && failed.len() == 7 && failed[0] == "database", "{findings:#?}");
    // One after the other it would be at least 14 s.
    ensure!(took < Duration::from_secs(10), "{took:?}");
    Ok(())
}
