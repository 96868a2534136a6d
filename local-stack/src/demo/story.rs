//! The steps of the demo, in their order.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use local_stack::{
    Behaviour, Environment, KafkaTap, Names, PartnerStub, Process, Program, Sampler, Stack, StackOptions, ideal, peak,
    thousands,
};

use super::database::Database;
use super::progress::Progress;
use super::queues::Queues;
use super::report::{Cpu, FastEvents, KafkaRecords, Machine, MemoryFigures, QueueFigures, Report, Rows, Stages};
use super::summary::Addresses;
use super::watch::Watch;
use super::{REAL_LISTINGS, Settings};
use crate::variables_file::VariablesFile;

/// How long the service rests before its memory "before" is taken.
const REST: Duration = Duration::from_secs(5);
/// When its memory "after" is taken.
const AFTER: Duration = Duration::from_secs(10);
/// What came of the demo, and everything that still runs: the service first, because what is dropped first stops first.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) report: Report,
    _serve: Process,
    _tap: KafkaTap,
    program: Program,
    _stack: Stack,
    partner: PartnerStub,
}

impl Told {
    /// Writes the variables for other commands of the service to a file, which goes away with what it points at.
    pub(super) fn write_variables(&self) -> Result<VariablesFile> {
        let path = local_stack::cache_directory()?.join("demo-env");
        VariablesFile::write(path, self.program.environment())
    }

    pub(super) fn addresses(&self, variables: &Path) -> Result<Addresses> {
        let environment = self.program.environment();
        Ok(Addresses {
            admin: environment.admin_url(),
            profiling: environment.profiling_url(),
            partner: self.partner.url(),
            database: environment.database_url().to_owned(),
            log: self.program.log().display().to_string(),
            service: self.program.binary().display().to_string(),
            variables: variables.display().to_string(),
        })
    }
}

/// Starts everything, sends the events, watches, and compares.
pub(super) async fn tell(settings: &Settings) -> Result<Told> {
    local_stack::allow_open_files()?;
    let mut progress = Progress::start();
    let latency = f64::from(settings.partner_latency_ms) / 1e3;
    let selectable = settings.limit.min(settings.seed_count);
    let named_listings = settings.upserts.min(REAL_LISTINGS);
    ensure!(
        settings.seed_count >= named_listings,
        "--seed-count {} is too few: the {} upserts are of listings that exist, so it must be {named_listings} at least",
        settings.seed_count,
        settings.upserts,
    );
    let ideal = ideal(selectable, settings.partner_rate_cap, settings.in_flight, latency);

    progress.step("starting PostgreSQL, SQS, Kafka and the partner");
    let partner = PartnerStub::start(Behaviour {
        latency_ms: settings.partner_latency_ms.into(),
        rate_cap: settings.partner_rate_cap,
        ..Behaviour::default()
    })?;
    let stack = Stack::start(StackOptions::default()).await?;
    let mut environment = Environment::create(&stack, Names::standard(), &partner.url()).await?;
    environment.set("partner.rate_per_second", &settings.partner_rate_cap.to_string());
    environment.set("partner.in_flight", &settings.in_flight.to_string());
    // Reads from the first record on: the broker keeps little.
    let tap = KafkaTap::counting(stack.kafka().bootstrap(), &environment.names().topic)?;
    let mut database = Database::connect(environment.database_url()).await?;
    let queues = Queues::new(&stack, environment.names().clone()).await;
    let program = Program::new(settings.service_binary.as_deref(), environment, "demo")?;

    progress.step("write-api setup: schema, queues, topic");
    program.run(&["setup"]).await?;
    progress.step(&format!("write-api seed: {} listings", thousands(settings.seed_count.into())));
    program.run(&["seed", "--count", &settings.seed_count.to_string()]).await?;
    progress.step("write-api serve");
    let serve = program.serve().await?;
    let sampler = Sampler::start(serve.id())?;
    progress.step(&format!("ready as process {}; {} s to see its memory at rest", serve.id(), REST.as_secs()));
    tokio::time::sleep(REST).await;

    let run_id = format!("nightly-{}", uuid::Uuid::new_v4());
    let watch = Watch {
        settings,
        ideal,
        run_id: &run_id,
        program: &program,
        serve: &serve,
        sampler: &sampler,
        partner: &partner,
        tap: &tap,
        database: &mut database,
        queues: &queues,
        progress: &mut progress,
    };
    let watched = watch.run().await?;
    progress.step(&format!("everything is done; {} s until memory is looked at again", AFTER.as_secs()));
    tokio::time::sleep(AFTER).await;
    let after = sampler.memory()?;
    let samples = sampler.samples_from(0.0);
    let peak = peak(&sampler.samples_from(watched.sent_at_sample)).unwrap_or(after);

    progress.step("comparing every valuation");
    let valuations = database.valuations(&run_id, settings.limit).await?;
    let written = database.listings_written().await?;
    let (stats, run) = (partner.stats(), watched.run);
    let fast = &watched.fast_beside;
    let mut report = Report {
        settings: settings.clone(),
        machine: Machine {
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            development_build: program.is_development_build(),
            postgres: stack.postgres().settings().await?,
        },
        run_id,
        rows: Rows::from(&run),
        valuations,
        kafka: KafkaRecords { records: tap.count(), distinct_ids: tap.distinct_ids(), missed: tap.missed() },
        fast_events: FastEvents::new(settings.upserts.into(), watched.fast_done, written, fast),
        stages: Stages::new(watched.sent_at, stats.first_call, run.completed_at, run.published_at, ideal),
        memory: MemoryFigures { before: watched.before, peak, after, samples },
        cpu: Cpu::new(watched.cpu_seconds, run.selected.cast_unsigned()),
        queues: QueueFigures { left: queues.left().await?, dead_letters: queues.dead_letters().await? },
        log_warnings: program.warnings()?,
        partner: stats,
        checks: Vec::new(),
    };
    report.check(selectable.into(), named_listings.into());
    drop(progress);
    Ok(Told { report, _serve: serve, _tap: tap, program, _stack: stack, partner })
}
