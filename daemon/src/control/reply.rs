//! The duty to answer a command.

use std::fmt;
use std::sync::mpsc;

use serde::Serialize;
use serde_json::Value;
use snapfence::protocol::{Empty, Failure};

type Deliver = Box<dyn FnOnce(Result<Value, Failure>) + Send>;

/// Answers one command, once, from any thread. Dropped without an answer, it answers that the command was abandoned.
pub struct Reply {
    deliver: Option<Deliver>,
}

impl Reply {
    /// A reply that goes to `deliver`.
    pub fn new(deliver: impl FnOnce(Result<Value, Failure>) + Send + 'static) -> Self {
        Self { deliver: Some(Box::new(deliver)) }
    }

    /// A reply that can be waited for, for commands that come from inside, or from a test.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Result<Value, Failure>>) {
        let (sender, receiver) = mpsc::channel();
        // Whoever drops the receiver does not want the answer.
        let reply = Self::new(move |result| drop(sender.send(result)));
        (reply, receiver)
    }

    /// Answers.
    pub fn send<T: Serialize>(mut self, result: Result<T, Failure>) {
        let result = result.and_then(|value| {
            serde_json::to_value(value).map_err(|error| Failure::generic(format_args!("the answer cannot be written as JSON: {error}")))
        });
        self.deliver(result);
    }

    /// Answers with a value.
    pub fn ok<T: Serialize>(self, value: T) {
        self.send(Ok(value));
    }

    /// Answers that it is done.
    pub fn done(self) {
        self.ok(Empty {});
    }

    /// Answers that it was not done.
    pub fn fail(self, failure: Failure) {
        self.send::<Empty>(Err(failure));
    }

    fn deliver(&mut self, result: Result<Value, Failure>) {
        if let Some(deliver) = self.deliver.take() {
            deliver(result);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.deliver(Err(Failure::generic("the daemon has abandoned this command; its log may say why")));
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Reply").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reply_answers_once() {
        let (reply, answers) = Reply::channel();
        reply.ok(7);
        assert_eq!(answers.iter().collect::<Vec<_>>(), [Ok(Value::from(7))]);
        let (reply, answers) = Reply::channel();
        drop(reply);
        let answers: Vec<_> = answers.iter().collect();
        assert!(matches!(answers.as_slice(), [Err(failure)] if failure.desc.contains("abandoned")));
    }
}
