//! `local-stack up`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use local_stack::{Behaviour, Environment, Names, PartnerStub, Stack, StackOptions};

use crate::variables_file::VariablesFile;

/// Everything runs on free ports of 127.0.0.1, with the names that the service has by default.
#[derive(Debug, Args)]
pub(super) struct Up {
    /// Where to write the variables [default: local-stack/env in the build's target directory]
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// The partner's time from a request to its answer, in milliseconds
    #[arg(long, default_value_t = 250)]
    partner_latency_ms: u64,
    /// The most requests that the partner takes in a second, 0 for no limit
    #[arg(long, default_value_t = 1000)]
    partner_rate_cap: u32,
}

impl Up {
    pub(super) async fn run(self) -> Result<()> {
        let env_file = match self.env_file {
            Some(file) => file,
            None => local_stack::cache_directory()?.join("env"),
        };
        let partner = PartnerStub::start(Behaviour {
            latency_ms: self.partner_latency_ms,
            rate_cap: self.partner_rate_cap,
            ..Behaviour::default()
        })?;
        let stack = Stack::start(StackOptions::default()).await?;
        let environment = Environment::create(&stack, Names::standard(), &partner.url()).await?;
        let written = VariablesFile::write(env_file, &environment)?;

        println!("PostgreSQL  {}", environment.database_url());
        println!("            {}", settings(&stack).await?);
        println!("SQS         {}", stack.sqs().endpoint());
        println!("Kafka       {}  (topic {})", stack.kafka().bootstrap(), environment.names().topic);
        println!("Partner     {}  (/stats, /control, /reset)", partner.url());
        println!("Logs        {}", stack.directory().display());
        println!();
        println!("In another shell:");
        println!("    . {}", written.path().display());
        let service = local_stack::profile_directory()?.join("write-api");
        println!("    for verb in setup seed serve; do {} $verb || break; done", service.display());
        println!();
        println!("Ctrl-C stops all of it.");
        std::future::pending().await
    }
}

async fn settings(stack: &Stack) -> Result<String> {
    let settings = stack.postgres().settings().await?;
    Ok(settings.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", "))
}
