//! Why a stream that was lost does not go on.

/// The reason, for the client's error event, the log and the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// `resume.enabled` is false.
    Disabled,
    /// The caller's key, or the request's header, wants none.
    OptedOut,
    /// The API's answers cannot be continued.
    Api,
    /// `n`, `best_of`, or several prompts.
    SeveralChoices,
    /// Beams are the engine's memory.
    BeamSearch,
    /// A grammar or a schema has a state in the middle of the answer.
    StructuredOutput,
    /// Penalties count the tokens of the output, which would be prompt.
    OutputPenalties,
    /// Another setting that looks back at the output.
    OutputState,
    /// Embeddings in place of a prompt cannot be continued by ids.
    PromptEmbeddings,
    /// A tool call has begun: its parser's state is not known.
    ToolCall,
    /// The model is still thinking: the parser's state is not known.
    Reasoning,
    /// The conversation is kept by the engine that is lost.
    EngineState,
    /// Something in the stream was not understood.
    Unreadable,
    /// The request's body was not understood.
    Body,
    /// The continuation does not fit what the client has seen.
    Mismatch,
    /// The stream has been continued as often as it may.
    Attempts,
    /// The pool's resume budget is spent.
    Budget,
    /// No engine took it.
    NoCapacity,
}

impl Refusal {
    /// Every reason, for metrics that exist at zero.
    pub const ALL: [Self; 18] = [
        Self::Disabled,
        Self::OptedOut,
        Self::Api,
        Self::SeveralChoices,
        Self::BeamSearch,
        Self::StructuredOutput,
        Self::OutputPenalties,
        Self::OutputState,
        Self::PromptEmbeddings,
        Self::ToolCall,
        Self::Reasoning,
        Self::EngineState,
        Self::Unreadable,
        Self::Body,
        Self::Mismatch,
        Self::Attempts,
        Self::Budget,
        Self::NoCapacity,
    ];

    /// Its name in metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::OptedOut => "opted_out",
            Self::Api => "api",
            Self::SeveralChoices => "several_choices",
            Self::BeamSearch => "beam_search",
            Self::StructuredOutput => "structured_output",
            Self::OutputPenalties => "output_penalties",
            Self::OutputState => "output_state",
            Self::PromptEmbeddings => "prompt_embeddings",
            Self::ToolCall => "tool_call",
            Self::Reasoning => "reasoning",
            Self::EngineState => "engine_state",
            Self::Unreadable => "unreadable",
            Self::Body => "body",
            Self::Mismatch => "mismatch",
            Self::Attempts => "attempts",
            Self::Budget => "budget",
            Self::NoCapacity => "no_capacity",
        }
    }

    /// The end of a sentence that begins "It could not be continued on another engine: ".
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Disabled => "this gateway does not continue streams",
            Self::OptedOut => "the request or its key asked not to be continued",
            Self::Api => "answers of this API cannot be",
            Self::SeveralChoices => "it has several choices (`n`, `best_of` or several prompts)",
            Self::BeamSearch => "it uses beam search",
            Self::StructuredOutput => "its output follows a grammar or schema that was half done",
            Self::OutputPenalties => "presence and frequency penalties depend on the output so far",
            Self::OutputState => "a sampling setting depends on the output so far",
            Self::PromptEmbeddings => "its prompt is embeddings",
            Self::ToolCall => "a tool call was half done",
            Self::Reasoning => "the model was still reasoning",
            Self::EngineState => "it refers to state that only the lost engine had",
            Self::Unreadable => "what had come of it was not understood",
            Self::Body => "the request was not understood well enough",
            Self::Mismatch => "the continuation did not fit what had been sent",
            Self::Attempts => "it had been continued as often as it may",
            Self::Budget => "too many streams were being continued at once",
            Self::NoCapacity => "no other engine took it",
        }
    }

    /// The field of the request that is the reason: OpenAI's `error.param`.
    #[must_use]
    pub const fn param(self) -> Option<&'static str> {
        match self {
            Self::SeveralChoices => Some("n"),
            Self::BeamSearch => Some("use_beam_search"),
            Self::StructuredOutput => Some("response_format"),
            Self::OutputPenalties => Some("frequency_penalty"),
            Self::ToolCall => Some("tools"),
            Self::PromptEmbeddings => Some("prompt_embeds"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_its_own_name_and_words() {
        let names: BTreeSet<_> = Refusal::ALL.map(Refusal::label).into();
        let words: BTreeSet<_> = Refusal::ALL.map(Refusal::reason).into();
        assert_eq!((names.len(), words.len()), (Refusal::ALL.len(), Refusal::ALL.len()));
    }
}
