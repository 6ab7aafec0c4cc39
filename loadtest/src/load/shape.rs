//! What holds over all events of a stream, also of one that was continued by another engine. Pure.
//!
//! One id, one time of creation and one model from the first event to the last, and one delta with the role.

use memchr::memmem;

use super::sse::{number_after, string_after};

/// How a stream contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misshapen {
    /// An event without an id, a time or a model.
    #[error("an event without id, created or model: {0}")]
    Nameless(String),
    /// An event of another stream, by its looks.
    #[error("began as {first}, went on as {then}")]
    Renamed {
        /// Id, time and model of the first event.
        first: String,
        /// Those of this one.
        then: String,
    },
    /// None, or more than one.
    #[error("{0} deltas with a role")]
    Roles(u32),
}

/// Follows one stream.
#[derive(Debug, Default)]
pub struct Shape {
    name: Option<String>,
    /// The start of an event, up to its choices: those of the others are mostly the same bytes.
    start: Vec<u8>,
    roles: u32,
}

impl Shape {
    /// Looks at one chunk of the answer (no comment, no error, not `[DONE]`).
    ///
    /// # Errors
    /// [`Misshapen`].
    pub fn take(&mut self, event: &[u8]) -> Result<(), Misshapen> {
        self.roles += u32::from(memmem::find(event, b"\"role\":\"").is_some());
        if !self.start.is_empty() && event.starts_with(&self.start) {
            return Ok(());
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let then = name(event).ok_or_else(|| Misshapen::Nameless(text(event)))?;
        match &self.name {
            Some(first) if *first != then => return Err(Misshapen::Renamed { first: first.clone(), then }),
            Some(_) => {}
            None => self.name = Some(then),
        }
        let choices = memmem::find(event, b"\"choices\"").unwrap_or(0);
        self.start = event.get(..choices).unwrap_or_default().to_vec();
        Ok(())
    }

    /// Looks back at all of them.
    ///
    /// # Errors
    /// [`Misshapen::Roles`].
    pub const fn end(&self) -> Result<(), Misshapen> {
        if self.roles == 1 { Ok(()) } else { Err(Misshapen::Roles(self.roles)) }
    }
}

/// Id, time of creation and model of an event.
fn name(event: &[u8]) -> Option<String> {
    let text = |name: &[u8]| std::str::from_utf8(string_after(event, name)?).ok();
    let created = number_after(event, b"\"created\":")?;
    Some(format!("{} of {} by {created}", text(b"\"id\":\"")?, text(b"\"model\":\"")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, created: u32, delta: &str) -> Vec<u8> {
        format!(
            "data: {{\"id\":\"{id}\",\"object\":\"x\",\"created\":{created},\"model\":\"m\",\"choices\":[{{\"delta\":{{{delta}}}}}]}}"
        )
        .into_bytes()
    }

    const ROLE: &str = "\"role\":\"assistant\",\"content\":\"\"";
    const TEXT: &str = "\"content\":\"\\\"role\\\":\\\"\"";

    fn check(events: &[Vec<u8>]) -> Result<(), Misshapen> {
        let mut shape = Shape::default();
        events.iter().try_for_each(|event| shape.take(event))?;
        shape.end()
    }

    #[test]
    fn a_stream_is_one_from_its_first_event_to_its_last() {
        let reordered =
            br#"data: {"model":"m","id":"a","created":1,"choices":[],"usage":{"prompt_tokens":1}}"#.to_vec();
        assert_eq!(check(&[event("a", 1, ROLE), event("a", 1, TEXT), reordered]), Ok(()));
        assert_eq!(check(&[event("a", 1, TEXT)]), Err(Misshapen::Roles(0)));
        assert_eq!(check(&[event("a", 1, ROLE), event("a", 1, ROLE)]), Err(Misshapen::Roles(2)));
        for other in [event("b", 1, TEXT), event("a", 2, TEXT)] {
            assert!(matches!(check(&[event("a", 1, ROLE), other]), Err(Misshapen::Renamed { .. })));
        }
        assert!(matches!(check(&[b"data: {}".to_vec()]), Err(Misshapen::Nameless(_))));
    }
}
