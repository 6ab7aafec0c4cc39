//! What vLLM's reasoning and tool parsers make of an answer, as far as a test needs it: the first tokens are reasoning, the
//! next ones the arguments of a call, the rest content. Pure.
//!
//! `--sim-reasoning-tokens N` makes the first N tokens of each chat answer reasoning (`delta.reasoning`; a thinking block
//! in Anthropic's API). `--sim-tool-call-tokens N` makes the N tokens behind them the arguments of a call
//! (`delta.tool_calls`) of the request's first tool, if it has tools and may call them. The texts are those that the tokens
//! have anyway, so the arguments are no JSON. Completions and responses are not parsed.

/// How an answer is parsed.
#[derive(Debug, Clone, Default)]
pub(super) struct Parser {
    reasoning: u64,
    call: u64,
    /// Of the tool that is called.
    tool: String,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// A part of the answer.
    Content,
    /// Of the reasoning before it.
    Reasoning,
    /// Of the arguments of a call; the first of them also tells its name.
    Call {
        /// It is the first.
        first: bool,
    },
}

impl Parser {
    /// For an answer to a request that may call `tool`.
    pub(super) fn new(reasoning: u64, call: u64, tool: Option<String>) -> Self {
        Self { reasoning, call: if tool.is_some() { call } else { 0 }, tool: tool.unwrap_or_default() }
    }

    /// What token number `at` is, counted from 0.
    pub(super) const fn part(&self, at: u64) -> Part {
        if at < self.reasoning {
            Part::Reasoning
        } else if at < self.reasoning + self.call {
            Part::Call { first: at == self.reasoning }
        } else {
            Part::Content
        }
    }

    /// The ids of the reasoning, of the call, and the others.
    pub(super) fn split<'a>(&self, ids: &'a [u32]) -> [&'a [u32]; 3] {
        let length = |tokens: u64| usize::try_from(tokens).unwrap_or(usize::MAX);
        let (reasoning, rest) = ids.split_at(length(self.reasoning).min(ids.len()));
        let (call, content) = rest.split_at(length(self.call).min(rest.len()));
        [reasoning, call, content]
    }

    /// True if an answer of so many tokens has a call.
    pub(super) const fn calls(&self, tokens: u64) -> bool {
        self.call > 0 && tokens > self.reasoning
    }

    /// The name of the tool that is called.
    pub(super) fn tool(&self) -> &str {
        &self.tool
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_parted_in_order() {
        let parser = Parser::new(2, 2, Some("f".into()));
        let parts: Vec<Part> = (0..5).map(|at| parser.part(at)).collect();
        let call = |first| Part::Call { first };
        assert_eq!(parts, [Part::Reasoning, Part::Reasoning, call(true), call(false), Part::Content]);
        assert_eq!(parser.split(&[1, 2, 3, 4, 5]), [&[1, 2][..], &[3, 4], &[5]]);
        assert_eq!(parser.split(&[1]), [&[1][..], &[], &[]]);
        assert!(!parser.calls(2) && parser.calls(3));
        assert_eq!(Parser::new(0, 2, None).part(0), Part::Content, "nothing to call");
    }
}
