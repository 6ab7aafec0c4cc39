//! `/v1/completions`: text and token-id prompts, one or many.

use serde_json::Value;

use super::{
    args::Options,
    chat::{Origin, break_stream, close_stream, push_fingerprint, push_optional_ids, push_unary_usage},
    error::ApiError,
    generation::{Outcome, block_hashes},
    logprobs::{self, Logprobs},
    render::{Frame, Job, Render, Token, Usage, push_escaped, push_finish, push_ids, quoted},
    request::{Fields, Sampling, StreamUsage, token_ids},
    tokens,
};

/// Default of the completions API.
const DEFAULT_MAX_TOKENS: u64 = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 1024;

/// Makes a job of a completion request.
///
/// # Errors
/// 400 or 404, naming the field.
pub(super) fn job(mut fields: Fields, origin: &Origin, options: &Options) -> Result<Job, ApiError> {
    let (model, prompts, stream) = (fields.model(options)?, prompts(&mut fields)?, fields.flag("stream")?);
    let usage = StreamUsage::take(&mut fields, stream, options)?;
    let return_ids = fields.flag("return_token_ids")?;
    let top = logprobs::of_completion(&mut fields)?;
    let mut sampling = Sampling::take(&mut fields, &["max_tokens"], "stop")?;
    sampling.max_tokens = sampling.max_tokens.or(Some(DEFAULT_MAX_TOKENS));
    let (mut generations, mut blocks, mut prompt_ids, mut prompt_tokens) =
        (Vec::new(), Vec::new(), Vec::new(), 0);
    for ids in prompts {
        let (prefix, hashes) = block_hashes(&ids);
        prompt_tokens += prefix.len();
        let choices = sampling.generations(&ids, prefix, options.max_model_len)?;
        blocks.extend(std::iter::repeat_n(hashes, choices.len()));
        prompt_ids.extend(std::iter::repeat_n(if return_ids { Some(ids) } else { None }, choices.len()));
        generations.extend(choices);
    }
    let logprobs = top.map(|top| Logprobs::new(top, generations.iter().map(|g| *g.prefix()).collect()));
    let renderer = Completion {
        logprobs,
        ..Completion::new(&format!("cmpl-{}", origin.id), &model, origin, usage, prompt_ids)
    };
    Ok(Job {
        generations,
        blocks,
        prompt_tokens,
        n: sampling.n,
        max_tokens: sampling.max_tokens,
        stream,
        render: Box::new(renderer),
    })
}

/// The prompts' ids.
fn prompts(fields: &mut Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = || {
        ApiError::invalid(
            "string_type",
            "prompt",
            "Input should be a valid string, or a list of strings or token ids",
        )
    };
    let all = match fields.take("prompt") {
        None => return Err(ApiError::invalid("missing", "prompt", "Field required")),
        Some(Value::String(text)) => vec![tokens::encoded(&text)],
        Some(Value::Array(items)) if items.first().is_some_and(Value::is_number) => {
            vec![token_ids(&items, "prompt")?]
        }
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(tokens::encoded(text)),
                Value::Array(ids) => token_ids(ids, "prompt"),
                _ => Err(wrong()),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    match all.len() {
        0 => Err(ApiError::bad("prompt", "Either prompt or prompt_embeds must be provided and non-empty.")),
        n if n > MAX_PROMPTS => {
            Err(ApiError::bad("prompt", format!("at most {MAX_PROMPTS} prompts, got {n}")))
        }
        _ => Ok(all),
    }
}

/// Renders completion chunks.
struct Completion {
    head: String,
    /// Before the text of choice i, from `data:`.
    before: Vec<Vec<u8>>,
    fingerprint: String,
    usage: StreamUsage,
    /// Of each choice's prompt, if asked for.
    prompt_ids: Vec<Option<Vec<u32>>>,
    /// Choices whose first chunk is out.
    opened: Vec<bool>,
    logprobs: Option<Logprobs>,
}

impl Completion {
    fn new(
        id: &str,
        model: &str,
        origin: &Origin,
        usage: StreamUsage,
        prompt_ids: Vec<Option<Vec<u32>>>,
    ) -> Self {
        let (id, model) = (quoted(id), quoted(model));
        let head = format!(
            "{{\"id\":{id},\"object\":\"text_completion\",\"created\":{},\"model\":{model}",
            origin.created
        );
        let before = |i| format!("data: {head},\"choices\":[{{\"index\":{i},\"text\":\"").into_bytes();
        let choices = prompt_ids.len();
        Self {
            before: (0..choices).map(before).collect(),
            head,
            fingerprint: origin.fingerprint.clone(),
            usage,
            prompt_ids,
            opened: vec![false; choices],
            logprobs: None,
        }
    }

    fn push_logprobs(&mut self, out: &mut Vec<u8>, choice: usize, ids: &[u32]) {
        match &mut self.logprobs {
            Some(logprobs) => logprobs.push_completion(out, choice, ids),
            None => out.extend_from_slice(b"null"),
        }
    }
}

impl Render for Completion {
    fn open(&mut self, _frame: &mut Frame, _usage: Usage) {}

    fn token(&mut self, frame: &mut Frame, token: &Token<'_>) {
        let first = !std::mem::replace(&mut self.opened[token.choice], true);
        frame.event(|out| {
            out.extend_from_slice(&self.before[token.choice]);
            push_escaped(out, token.text);
            out.extend_from_slice(b"\",\"logprobs\":");
            self.push_logprobs(out, token.choice, token.id.as_slice());
            out.push(b',');
            match token.finish {
                None => out.extend_from_slice(b"\"finish_reason\":null,\"stop_reason\":null"),
                Some(finish) => push_finish(out, finish, finish.reason()),
            }
            let prompt_ids = self.prompt_ids[token.choice].as_ref();
            out.extend_from_slice(b",\"prompt_token_ids\":");
            push_optional_ids(out, prompt_ids.filter(|_| first));
            out.extend_from_slice(b",\"token_ids\":");
            match prompt_ids {
                None => out.extend_from_slice(b"null"),
                Some(_) => push_ids(out, token.id.as_slice()),
            }
            out.extend_from_slice(b"}]");
            if self.usage.continuous {
                out.extend_from_slice(b",\"usage\":");
                Usage { cached: 0, ..token.usage }.push_openai(out);
            }
            if token.finish.is_some() && !self.usage.at_end {
                push_fingerprint(out, &self.fingerprint);
            }
            out.extend_from_slice(b"}\n\n");
        });
    }

    fn close(&mut self, frame: &mut Frame, usage: Usage) {
        close_stream(frame, self.usage.at_end.then_some(usage), &self.head, &self.fingerprint);
    }

    fn error(&mut self, frame: &mut Frame, error: &ApiError) -> bool {
        break_stream(frame, error);
        true
    }

    fn unary(&mut self, outcomes: &[Outcome], usage: Usage) -> Vec<u8> {
        let mut out = format!("{},\"choices\":[", self.head).into_bytes();
        for (i, outcome) in outcomes.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            out.extend_from_slice(format!("{comma}{{\"index\":{i},\"text\":\"").as_bytes());
            push_escaped(&mut out, &outcome.text);
            out.extend_from_slice(b"\",\"logprobs\":");
            self.push_logprobs(&mut out, i, &outcome.ids);
            out.push(b',');
            push_finish(&mut out, &outcome.finish, outcome.finish.reason());
            let prompt_ids = self.prompt_ids.get(i).and_then(Option::as_ref);
            out.extend_from_slice(b",\"token_ids\":");
            push_optional_ids(&mut out, prompt_ids.map(|_| &outcome.ids));
            out.extend_from_slice(b",\"prompt_logprobs\":null,\"prompt_token_ids\":");
            push_optional_ids(&mut out, prompt_ids);
            out.extend_from_slice(b",\"routed_experts\":null}");
        }
        out.extend_from_slice(b"],\"service_tier\":null");
        push_fingerprint(&mut out, &self.fingerprint);
        out.extend_from_slice(b",\"usage\":");
        push_unary_usage(&mut out, usage);
        out.extend_from_slice(b",\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":null}");
        out
    }
}
