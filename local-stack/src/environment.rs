//! The `WRITE_API_*` variables that point a service at a stack.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;

use crate::kafka::KafkaTap;
use crate::machine;
use crate::sqs::{ACCESS_KEY, REGION};
use crate::stack::Stack;

/// How many partitions the topic has.
const PARTITIONS: i32 = 12;

/// What one service calls its things.
#[derive(Clone, Debug)]
pub struct Names {
    /// The database.
    pub database: String,
    /// The queue that producers send to.
    pub events_queue: String,
    /// The queue of the slow events.
    pub valuations_queue: String,
    /// The queue of the post-processing events.
    pub post_processing_queue: String,
    /// The Kafka topic.
    pub topic: String,
}

impl Names {
    /// The names that the service has by default.
    #[must_use]
    pub fn standard() -> Self {
        Self::with_prefix("writeapi", "listing-valuations", "write_api")
    }

    /// Names that nobody used before.
    #[must_use]
    pub fn unique() -> Self {
        let id = uuid::Uuid::new_v4().simple();
        Self::with_prefix(&format!("test-{id}"), &format!("test-{id}"), &format!("test_{id}"))
    }

    fn with_prefix(queues: &str, topic: &str, database: &str) -> Self {
        Self {
            database: database.to_owned(),
            events_queue: format!("{queues}-events"),
            valuations_queue: format!("{queues}-valuations"),
            post_processing_queue: format!("{queues}-post-processing"),
            topic: topic.to_owned(),
        }
    }
}

/// A database, a topic, and the settings of one service that uses them. The queues are made by the service's `setup`.
#[derive(Clone, Debug)]
pub struct Environment {
    names: Names,
    database_url: String,
    bootstrap: String,
    admin_port: u16,
    profiling_port: u16,
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// Makes the database and the topic.
    pub async fn create(stack: &Stack, names: Names, partner_url: &str) -> Result<Self> {
        let database_url = stack.postgres().create_database(&names.database).await?;
        stack.kafka().create_topic(&names.topic, PARTITIONS).await?;
        let (admin_port, profiling_port) = (machine::free_port()?, machine::free_port()?);
        let bootstrap = stack.kafka().bootstrap().to_owned();
        // Credentials go by AWS's own variables.
        let credentials = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"].map(|name| (name.into(), ACCESS_KEY.into()));
        let mut environment =
            Self { names, database_url, bootstrap, admin_port, profiling_port, variables: credentials.into() };

        environment.set("aws.region", REGION);
        environment.set("aws.endpoint_url", stack.sqs().endpoint());
        environment.set("database.url", &environment.database_url.clone());
        environment.set("partner.base_url", partner_url);
        environment.set("kafka.brokers", &environment.bootstrap.clone());
        environment.set("kafka.topic", &environment.names.topic.clone());
        environment.set_own();
        Ok(environment)
    }

    /// The same with queues and ports of its own, for another service on the same database and topic. An emulator may still
    /// give a message to a poll whose process is gone, so what starts after another one is better off with other queues.
    pub fn beside(&self) -> Result<Self> {
        let Names { database, topic, .. } = self.names.clone();
        let mut environment = Self {
            names: Names { database, topic, ..Names::unique() },
            admin_port: machine::free_port()?,
            profiling_port: machine::free_port()?,
            ..self.clone()
        };
        environment.set_own();
        Ok(environment)
    }

    /// What no two services share.
    fn set_own(&mut self) {
        let Names { events_queue, valuations_queue, post_processing_queue, .. } = self.names.clone();
        self.set("lanes.events.queue", &events_queue);
        self.set("lanes.valuations.queue", &valuations_queue);
        self.set("lanes.post_processing.queue", &post_processing_queue);
        self.set("admin.listen", &format!("127.0.0.1:{}", self.admin_port));
        self.set("profiling.listen", &format!("127.0.0.1:{}", self.profiling_port));
    }

    /// Sets the service's setting `key`, written as in its configuration file: `queue.wait_time`.
    pub fn set(&mut self, key: &str, value: &str) -> &mut Self {
        let name = format!("WRITE_API_{}", key.replace('.', "_").to_uppercase());
        self.variables.insert(name, value.to_owned());
        self
    }

    /// Sets a variable that is not the service's own, such as AWS's.
    pub fn set_variable(&mut self, name: &str, value: &str) -> &mut Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The variables, for [`Command::envs`](std::process::Command::envs).
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The variables as lines for a shell: `export NAME='value'`.
    #[must_use]
    pub fn shell_script(&self) -> String {
        let mut script = String::new();
        for (name, value) in &self.variables {
            let quoted = value.replace('\'', r"'\''");
            let _ = writeln!(script, "export {name}='{quoted}'");
        }
        script
    }

    /// The names in use.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The database's URL.
    #[must_use]
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// The service's own HTTP address for health and metrics: http://host:port.
    #[must_use]
    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    /// The service's own HTTP address for profiling: http://host:port.
    #[must_use]
    pub fn profiling_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.profiling_port)
    }

    /// Starts to read the topic, keeping every record.
    pub fn tap(&self) -> Result<KafkaTap> {
        KafkaTap::start(&self.bootstrap, &self.names.topic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_variables_that_a_shell_reads_back() {
        let mut environment = Environment {
            names: Names::standard(),
            database_url: String::new(),
            bootstrap: String::new(),
            admin_port: 1,
            profiling_port: 2,
            variables: BTreeMap::new(),
        };
        environment.set("lanes.post_processing.in_flight", "8").set("log.level", "it's");
        let script = environment.shell_script();
        assert_eq!(
            script,
            "export WRITE_API_LANES_POST_PROCESSING_IN_FLIGHT='8'\nexport WRITE_API_LOG_LEVEL='it'\\''s'\n"
        );
    }

    #[test]
    fn unique_names_fit_their_systems() {
        let (one, two) = (Names::unique(), Names::unique());
        assert_ne!(one.database, two.database);
        assert!(one.database.len() <= 63);
        // SQS allows 80 characters, of which the dead-letter queue takes four more.
        assert!(one.post_processing_queue.len() <= 76);
    }
}
