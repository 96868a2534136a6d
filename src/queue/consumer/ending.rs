//! The end of each message: what is told of its event, and what becomes of it.

use std::time::Duration;

use super::super::sqs::Extension;
use super::super::{Delivery, Message, Outcome};
use super::Consumer;
use crate::{fault, task};

impl Consumer {
    /// The one log line of an event, and its metrics.
    pub(super) fn report(&self, delivery: &Delivery, outcome: &Outcome, took: Duration) {
        let (kind, event_id) = match delivery.identity() {
            Some(identity) => (identity.kind, identity.event_id.as_str()),
            None => ("unknown", ""),
        };
        let metrics = &self.parts.metrics;
        metrics.event_seconds.with_label_values(&[kind]).observe(took.as_secs_f64());
        metrics.events.with_label_values(&[kind, outcome.name()]).inc();
        let duration_ms = took.as_secs_f64() * 1000.0;
        let attempt = delivery.message.receive_count;
        let (lane, message_id) = (self.parts.lane, delivery.message.id.as_str());
        let used = task::ledger().map(|ledger| ledger.read()).unwrap_or_default();
        let (allocated_bytes, freed_bytes, polls) = (used.allocated, used.freed, used.polls);
        let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        let busy_ms = milliseconds(used.busy);
        let waits = used.waits_by_name().map(|(name, waited)| format!("{name}={}", milliseconds(waited)));
        let waited_ms = waits.collect::<Vec<_>>().join(" ");
        macro_rules! line {
            ($level:ident, $text:literal $(, $field:ident)*) => {
                tracing::$level!(
                    event_id, kind, lane, message_id, attempt, duration_ms, busy_ms, waited_ms, allocated_bytes,
                    freed_bytes, polls, outcome = outcome.name() $(, $field)*, $text
                )
            };
        }
        match outcome {
            Outcome::Done { rows, note } => {
                let (rows, note) = (*rows, &**note);
                line!(info, "event done", rows, note)
            }
            Outcome::Cancelled { rows, note } => {
                let (rows, note) = (*rows, &**note);
                line!(info, "event cancelled", rows, note)
            }
            Outcome::Forwarded(to) => {
                let to = *to;
                line!(info, "event forwarded to its lane", to)
            }
            Outcome::Retry(error) => {
                let error = format!("{error:#}");
                line!(error, "event failed and will be retried", error)
            }
            Outcome::Defer(after, note) => {
                let (after_seconds, note) = (after.as_secs_f64(), &**note);
                line!(info, "event deferred", after_seconds, note)
            }
            Outcome::Release(note) => {
                let note = &**note;
                line!(info, "event given back", note)
            }
            Outcome::Lost => line!(warn, "event lost to another worker"),
            Outcome::Refuse(refusal) => {
                let (code, reason) = (refusal.code, refusal.reason.as_str());
                line!(warn, "event refused, it goes to the dead-letter queue", code, reason)
            }
        }
    }

    /// Ends the message as the outcome says: deleted, on its way to the dead-letter queue, or given back.
    pub(super) async fn settle(&self, delivery: Delivery, outcome: Outcome) {
        let attempt = delivery.message.receive_count;
        let backoff = self.parts.queue.retry;
        let visible_in = match outcome {
            Outcome::Done { .. } | Outcome::Cancelled { .. } | Outcome::Forwarded(_) => {
                return self.delete(delivery).await;
            }
            Outcome::Lost => return,
            Outcome::Refuse(refusal) => {
                fault::point("refuse.before_send", delivery.fault_key());
                let sent = self.parts.sqs.send_refused(&self.dead, &refusal, &delivery.message, &self.source);
                // Boxed, as the other calls of SQS here: a task is as large as the largest of its ways.
                let sent = Box::pin(sent).await;
                // Not before: what dies of its own refusal would be begun anew for ever.
                self.conclude(&delivery).await;
                match sent {
                    Ok(()) => {
                        fault::point("refuse.after_send", delivery.fault_key());
                        return self.delete(delivery).await;
                    }
                    Err(error) => {
                        tracing::error!(%error, "a refused event did not reach its dead-letter queue; trying again later");
                        backoff.wait(attempt)
                    }
                }
            }
            Outcome::Retry(_) => backoff.wait(attempt),
            Outcome::Defer(after, _) => after,
            Outcome::Release(_) => Duration::ZERO,
        };
        if self.is_worn(&delivery) && Box::pin(self.send_anew(&delivery, visible_in)).await {
            return self.delete(delivery).await;
        }
        Box::pin(self.give_back_in(delivery, visible_in)).await;
    }

    pub(super) async fn conclude(&self, delivery: &Delivery) {
        self.parts.handler.conclude(delivery).await;
        delivery.concluded();
    }

    async fn delete(&self, delivery: Delivery) {
        let Message { id, receipt, .. } = delivery.message;
        self.deleter.delete(id, receipt, delivery.lease).await;
    }

    /// Whether the message nears the number of receives after which SQS would take it for dead. A stop gives it back all
    /// the same: that costs one receive, and a send could cost the time that is left.
    fn is_worn(&self, delivery: &Delivery) -> bool {
        delivery.message.receive_count >= self.parts.queue.most_receives && !self.parts.stop.is_draining()
    }

    /// Sends the body as a new message, whose receives count from 0, to the same queue. Until the old one is deleted there
    /// are two of them, which the event's id absorbs.
    async fn send_anew(&self, delivery: &Delivery, visible_in: Duration) -> bool {
        let Message { id, body, receive_count, redrives, .. } = &delivery.message;
        fault::point("resend.before_send", delivery.fault_key());
        match self.parts.sqs.send_delayed(&self.source, body, *redrives, visible_in).await {
            Ok(()) => {
                fault::point("resend.after_send", delivery.fault_key());
                self.parts.metrics.resent.with_label_values(&[self.parts.lane]).inc();
                let event_id = delivery.identity().map_or("", |identity| identity.event_id.as_str());
                tracing::info!(
                    event_id,
                    message_id = id,
                    receive_count,
                    lane = self.parts.lane,
                    "an event that was received very often was sent anew"
                );
                true
            }
            Err(error) => {
                tracing::warn!(message_id = id, receive_count, %error, "an event was not sent anew and is given back");
                false
            }
        }
    }

    async fn give_back_in(&self, delivery: Delivery, visible_in: Duration) {
        let entry = [(delivery.message.receipt, visible_in)];
        delivery.lease.let_go().await;
        match self.parts.sqs.change_visibility(&self.source, &entry).await.map(|mut results| results.pop()) {
            Ok(Some(Extension::Extended) | None) => {}
            Ok(Some(Extension::Refused(reason) | Extension::Failed(reason))) => {
                tracing::warn!(reason, "a message was not given back; it comes again after its visibility timeout");
            }
            Err(error) => {
                tracing::warn!(%error, "a message was not given back; it comes again after its visibility timeout");
            }
        }
    }
}
