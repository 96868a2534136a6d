//! The service's promises, kept by the real program against real neighbours: one module for each kind of promise.
//!
//! Each test has a [`harness::World`] of its own: a database, queues, a topic and a partner that nobody else uses. The
//! program is a child process, as in production, so that it can be stopped, killed and suspended.

mod attempts;
mod audit;
mod aws_credentials;
mod bad_input;
mod batches;
mod check;
mod cli;
mod consumer;
mod dlq;
mod duplicates;
mod ends;
mod group_commit;
mod harness;
mod health;
mod kafka_refusals;
mod kafka_security;
mod leases;
mod main_job;
mod metrics;
mod neighbours;
mod operate;
mod ordering;
mod partner_faults;
mod postgres_faults;
mod postgres_tls;
mod pprof;
mod probation;
mod profile_verbs;
mod profiler_cost;
mod recording;
mod replay;
mod resume;
mod retention;
mod secrets;
mod shutdown;
mod snapshots;
mod snapshots_s3;
mod sqs_stub;
mod state_machine;
