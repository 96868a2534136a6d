//! `before-after`: the old way, its first repair and WriteApi, one after another on one stack, with the pictures.
//!
//! - [`way`] says what is compared;
//! - [`course`] lets each of them work and looks on: [`timeline`] has the curves, [`heap`] what memory was held by;
//! - [`report`] holds the figures, [`page`] draws them with [`chart`].

mod chart;
mod course;
mod heap;
mod page;
mod report;
mod timeline;
mod way;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bench::machine::Machine;
use clap::{Parser, value_parser};
use local_stack::{Behaviour, Environment, KafkaTap, Names, PartnerStub, Program, SqsProxy, Stack, StackOptions};

use course::Course;
use report::{Report, Settings};
use way::Way;

/// The old way, its first repair and WriteApi on the same data, the same partner, in the same minutes; writes report.html
/// and report.json.
#[derive(Debug, Parser)]
#[command(name = "before-after", version)]
struct Arguments {
    /// Listings of an event, for each event that every way gets in turn
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [17_000, 170_000], value_parser = value_parser!(u32).range(1..=10_000_000))]
    rows: Vec<u32>,
    /// The partner's time from a request to its answer, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 20)]
    partner_latency_ms: u32,
    /// The most partner calls that the old way makes for an event: one after another, all of them would take hours
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = value_parser!(u32).range(10..))]
    calls: u32,
    /// Scale nothing: the old way makes all of its calls, which takes most of an hour and more at the usual sizes
    #[arg(long, conflicts_with = "calls")]
    full: bool,
    /// The directory for the report [default: before-after, in cargo's target directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(compare(Arguments::parse()))
}

async fn compare(arguments: Arguments) -> Result<()> {
    let began = Instant::now();
    let say = |text: &str| println!("{:5.1} s  {text}", began.elapsed().as_secs_f64());
    local_stack::allow_open_files()?;
    ensure!(!arguments.rows.is_empty(), "--rows needs a number at least");
    let most = arguments.rows.iter().copied().max().unwrap_or_default();
    let directory = match arguments.out {
        Some(directory) => directory,
        None => local_stack::cache_directory()?.with_file_name("before-after"),
    };
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let ended = tokio::signal::ctrl_c();

    let work = async {
        say("starting PostgreSQL, SQS, Kafka and the partner");
        let partner = Arc::new(PartnerStub::start(Behaviour {
            latency_ms: arguments.partner_latency_ms.into(),
            ..Behaviour::default()
        })?);
        let stack = Stack::start(StackOptions::default()).await?;
        let sqs = SqsProxy::start(stack.sqs().endpoint())?;
        let environment = Environment::create(&stack, Names::standard(), &partner.url()).await?;
        let tap = Arc::new(KafkaTap::counting(stack.kafka().bootstrap(), &environment.names().topic)?);
        let service = Program::new(None, environment.clone(), "before-after")?;
        say(&format!("schema, queues, topic; {most} listings"));
        service.run(&["setup"]).await?;
        service.run(&["seed", "--count", &most.to_string()]).await?;

        let settings = Settings {
            rows: arguments.rows.clone(),
            partner_latency_ms: arguments.partner_latency_ms,
            calls_of_the_old_way: (!arguments.full).then_some(arguments.calls),
        };
        let client = stack.sqs().client().await;
        let mut ways = Vec::new();
        for way in Way::ALL {
            say(&format!("{}: {}", way.name(), way.about()));
            let mut own = environment.beside()?;
            own.set("aws.endpoint_url", &sqs.endpoint());
            own.set("partner.rate_per_second", "0");
            Program::new(None, own.clone(), "before-after")?.run(&["setup"]).await?;
            let course = Course {
                way,
                settings: &settings,
                environment: &own,
                partner: &partner,
                sqs: &sqs,
                client: &client,
                tap: &tap,
                directory: &directory,
                say: &say,
            };
            ways.push(course.run().await?);
        }
        let machine = Machine::of(stack.postgres(), &service).await?;
        anyhow::Ok(Report { settings, machine, ways })
    };
    let report = tokio::select! {
        report = Box::pin(work) => report?,
        _ = ended => anyhow::bail!("stopped before the report"),
    };
    let (html, json) = (directory.join("report.html"), directory.join("report.json"));
    std::fs::write(&html, page::html(&report)?).with_context(|| format!("cannot write {}", html.display()))?;
    std::fs::write(&json, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    print!("\n{}\n", report.text());
    println!("the pictures: {}\nall figures:  {}", html.display(), json.display());
    Ok(())
}
