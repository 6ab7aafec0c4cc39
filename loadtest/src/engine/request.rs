//! Reading what clients ask: JSON fields with vLLM's refusals, and the parameters all generation endpoints share. Pure.
//!
//! The body becomes a JSON object whose last duplicate wins (as in Python); fields are taken out by name, and everything
//! else is ignored, as vLLM does. Strings are moved, not copied: a prompt of megabytes is held once.

use serde_json::{Map, Value};

use super::{
    args::Options,
    error::ApiError,
    generation::{Generation, Limits},
    http::Head,
    tokens::{self, Prefix},
};

/// Most choices of one request.
const MAX_CHOICES: u64 = 128;

/// A request's JSON object.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// 400 if it is no JSON object or not sent as JSON.
    pub(super) fn parse(head: &Head, body: &[u8]) -> Result<Self, ApiError> {
        let media = head.header("content-type").unwrap_or("");
        let media = media.split(';').next().unwrap_or("").trim();
        if !media.eq_ignore_ascii_case("application/json") {
            return Err(ApiError {
                kind: "Bad Request",
                ..ApiError::bad(
                    "",
                    "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
                )
            });
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => {
                Err(ApiError::invalid("model_attributes_type", "", "Input should be a valid dictionary"))
            }
            Err(e) => Err(ApiError::invalid("json_invalid", "", &format!("JSON decode error: {e}"))),
        }
    }

    /// Those of a form.
    pub(super) const fn of(fields: Map<String, Value>) -> Self {
        Self(fields)
    }

    /// Takes a field out; null counts as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.get_mut(name).map(Value::take).filter(|v| !v.is_null())
    }

    /// A string.
    ///
    /// # Errors
    /// 400 for another type.
    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::invalid("string_type", name, "Input should be a valid string")),
        }
    }

    /// A boolean; absent = false.
    ///
    /// # Errors
    /// 400 for another type.
    pub(super) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.optional_flag(name)?.unwrap_or(false))
    }

    /// A boolean.
    ///
    /// # Errors
    /// 400 for another type.
    pub(super) fn optional_flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(ApiError::invalid("bool_type", name, "Input should be a valid boolean")),
        }
    }

    /// A whole number.
    ///
    /// # Errors
    /// 400 for another type.
    pub(super) fn int(&mut self, name: &str) -> Result<Option<i64>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => match value.as_i64() {
                Some(int) => Ok(Some(int)),
                None => Err(ApiError::invalid("int_type", name, "Input should be a valid integer")),
            },
        }
    }

    /// A number within a range.
    ///
    /// # Errors
    /// 400 for another type, or outside.
    fn check_number(&mut self, name: &str, range: std::ops::RangeInclusive<f64>) -> Result<(), ApiError> {
        let Some(value) = self.take(name) else { return Ok(()) };
        match value.as_f64() {
            None => Err(ApiError::invalid("float_type", name, "Input should be a valid number")),
            Some(number) if !range.contains(&number) => Err(ApiError::bad(
                name,
                format!("{name} must be in [{}, {}], got {number}.", range.start(), range.end()),
            )),
            Some(_) => Ok(()),
        }
    }

    /// A string, or a list of strings.
    ///
    /// # Errors
    /// 400 for another type.
    pub(super) fn strings(&mut self, name: &str) -> Result<Vec<String>, ApiError> {
        let wrong =
            || ApiError::invalid("list_type", name, "Input should be a valid string or a list of strings");
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text]),
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| match item {
                    Value::String(text) => Ok(text),
                    _ => Err(wrong()),
                })
                .collect(),
            Some(_) => Err(wrong()),
        }
    }

    /// Checks `model`, if there is one.
    ///
    /// # Errors
    /// 404 for a model that is not served here.
    pub(super) fn model(&mut self, options: &Options) -> Result<String, ApiError> {
        match self.string("model")? {
            Some(model) if !model.is_empty() && !options.serves(&model) => {
                Err(ApiError::not_found("model", format!("The model `{model}` does not exist.")))
            }
            Some(model) if !model.is_empty() => Ok(model),
            _ => Ok(options.served_name().to_string()),
        }
    }
}

/// A list of token ids.
///
/// # Errors
/// 400 for what is no id of the vocabulary.
pub(super) fn token_ids(items: &[Value], field: &str) -> Result<Vec<u32>, ApiError> {
    let id = |item: &Value| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| id < tokens::VOCABULARY);
        id.ok_or_else(|| match item.as_i64() {
            Some(id) => ApiError::bad(field, format!("Token id {id} is out of vocabulary")),
            None => ApiError::invalid("int_type", field, "Input should be a valid integer"),
        })
    };
    items.iter().map(id).collect()
}

/// What all generation endpoints share.
#[derive(Debug, Default)]
pub(super) struct Sampling {
    /// Tokens to generate at most; none = as many as fit.
    pub(super) max_tokens: Option<u64>,
    /// The field that says so.
    limit_name: &'static str,
    min_tokens: u64,
    ignore_eos: bool,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    include_stop: bool,
    seed: Option<i64>,
    /// Choices per prompt.
    pub(super) n: u32,
}

impl Sampling {
    /// Takes the sampling parameters out. `max_tokens_names`: fields that may carry the limit, best first.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(super) fn take(
        fields: &mut Fields,
        max_tokens_names: &[&'static str],
        stop_name: &str,
    ) -> Result<Self, ApiError> {
        let (mut max_tokens, mut limit_name) = (None, "max_tokens");
        for name in max_tokens_names {
            let given = positive(fields, name, 1)?;
            if max_tokens.is_none() {
                (max_tokens, limit_name) = (given, name);
            }
        }
        fields.check_number("temperature", 0.0..=f64::MAX)?;
        fields.check_number("top_p", 0.0..=1.0)?;
        let n = positive(fields, "n", 1)?.unwrap_or(1);
        if n > MAX_CHOICES {
            return Err(ApiError::bad("n", format!("n must be at most {MAX_CHOICES}, got {n}.")));
        }
        // Endpoints that have them take `logprobs` and `top_logprobs` out before.
        for name in ["logprobs", "top_logprobs", "prompt_logprobs", "echo", "suffix", "use_beam_search"] {
            let asked = fields.take(name).is_some_and(|v| v != Value::Bool(false) && v != 0 && v != "");
            if asked {
                return Err(ApiError::bad(name, format!("`{name}` is not simulated; leave it out.")));
            }
        }
        let min_tokens = positive(fields, "min_tokens", 0)?.unwrap_or(0);
        let stop = fields.strings(stop_name)?;
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::bad(stop_name, "stop cannot contain an empty string."));
        }
        let stop_token_ids = match fields.take("stop_token_ids") {
            None => Vec::new(),
            Some(Value::Array(items)) => token_ids(&items, "stop_token_ids")?,
            Some(_) => {
                return Err(ApiError::invalid("list_type", "stop_token_ids", "Input should be a valid list"));
            }
        };
        Ok(Self {
            max_tokens,
            limit_name,
            min_tokens,
            ignore_eos: fields.flag("ignore_eos")?,
            stop,
            stop_token_ids,
            include_stop: fields.flag("include_stop_str_in_output")?,
            seed: fields.int("seed")?,
            n: u32::try_from(n).unwrap_or(1),
        })
    }

    /// The generations of the prompt `ids`, one per choice; `prefix` is theirs. What is asked for beyond the context is
    /// cut down to it, as vLLM does.
    ///
    /// # Errors
    /// 400 if the prompt does not fit `max_model_len`, or more than that is asked for.
    pub(super) fn generations(
        &self,
        ids: &[u32],
        prefix: Prefix,
        max_model_len: u64,
    ) -> Result<Vec<Generation>, ApiError> {
        if let Some(wanted) = self.max_tokens.filter(|&wanted| wanted > max_model_len) {
            let message = format!(
                "{name}={wanted} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens. \
                 (parameter={name}, value={wanted})",
                name = self.limit_name
            );
            return Err(ApiError::bad(self.limit_name, message));
        }
        let room = room_after(prefix.len(), max_model_len)?;
        let max_tokens = self.max_tokens.map_or(room, |wanted| wanted.min(room));
        if max_tokens == 0 {
            return Err(ApiError::bad(
                "max_tokens",
                "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
            ));
        }
        if self.min_tokens > max_tokens {
            let message = format!(
                "min_tokens must be less than or equal to max_tokens={max_tokens}, got {}.",
                self.min_tokens
            );
            return Err(ApiError::bad("min_tokens", message));
        }
        let limits = Limits {
            max_tokens,
            min_tokens: self.min_tokens,
            may_end: max_tokens == room && !self.ignore_eos,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            include_stop: self.include_stop,
        };
        let choice = |k| Generation::new(prefix, tokens::salt(self.seed, k), limits.clone()).after(ids);
        Ok((0..self.n).map(choice).collect())
    }
}

/// Tokens that fit behind a prompt.
///
/// # Errors
/// 400 if the prompt itself does not fit.
pub(super) fn room_after(prompt_tokens: u64, max_model_len: u64) -> Result<u64, ApiError> {
    if prompt_tokens == 0 {
        return Err(ApiError::bad("prompt", "The decoder prompt cannot be empty"));
    }
    max_model_len.checked_sub(prompt_tokens).ok_or_else(|| {
        let at_least = if prompt_tokens == max_model_len + 1 { "at least " } else { "" };
        let message = format!(
            "This model's maximum context length is {max_model_len} tokens. However, your prompt contains \
             {at_least}{prompt_tokens} input tokens, which exceeds this limit even without any output tokens. Please \
             reduce the length of the input prompt. (parameter=input_tokens, value={prompt_tokens})"
        );
        ApiError::bad("input_tokens", message)
    })
}

fn positive(fields: &mut Fields, name: &str, least: u64) -> Result<Option<u64>, ApiError> {
    let Some(given) = fields.int(name)? else { return Ok(None) };
    match u64::try_from(given) {
        Ok(number) if number >= least => Ok(Some(number)),
        _ => Err(ApiError::bad(name, format!("{name} must be at least {least}, got {given}."))),
    }
}

/// Which usage a stream reports.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StreamUsage {
    /// In a last chunk.
    pub(super) at_end: bool,
    /// In every chunk.
    pub(super) continuous: bool,
}

impl StreamUsage {
    /// Takes `stream_options` out.
    ///
    /// # Errors
    /// 400 if it is there without `stream`, or of the wrong type.
    pub(super) fn take(fields: &mut Fields, stream: bool, options: &Options) -> Result<Self, ApiError> {
        let forced = options.force_include_usage && stream;
        let value = match fields.take("stream_options") {
            None => return Ok(Self { at_end: forced, continuous: forced }),
            Some(_) if !stream => {
                return Err(ApiError::bad(
                    "stream_options",
                    "Stream options can only be defined when `stream=True`.",
                ));
            }
            Some(Value::Object(map)) => map,
            Some(_) => {
                return Err(ApiError::invalid(
                    "model_type",
                    "stream_options",
                    "Input should be a valid dictionary",
                ));
            }
        };
        let mut inner = Fields(value);
        let at_end = inner.flag("include_usage")? || forced;
        let continuous = at_end && (inner.flag("continuous_usage_stats")? || forced);
        Ok(Self { at_end, continuous })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::generation::complete, *};

    fn fields(json: &str) -> Fields {
        match serde_json::from_str(json).unwrap() {
            Value::Object(map) => Fields(map),
            _ => panic!("no object"),
        }
    }

    fn sampling(json: &str) -> Result<Sampling, ApiError> {
        Sampling::take(&mut fields(json), &["max_completion_tokens", "max_tokens"], "stop")
    }

    #[test]
    fn the_better_name_wins_and_null_is_absent() {
        assert_eq!(sampling("{\"max_tokens\":5,\"max_completion_tokens\":7}").unwrap().max_tokens, Some(7));
        assert_eq!(sampling("{\"max_tokens\":null,\"stop\":null,\"n\":null}").unwrap().max_tokens, None);
    }

    #[test]
    fn the_last_duplicate_wins() {
        assert_eq!(sampling("{\"max_tokens\":5,\"max_tokens\":6}").unwrap().max_tokens, Some(6));
    }

    #[test]
    fn refusals_name_the_field() {
        for (json, param) in [
            ("{\"max_tokens\":0}", "max_tokens"),
            ("{\"max_tokens\":\"7\"}", "body.max_tokens"),
            ("{\"max_tokens\":1.5}", "body.max_tokens"),
            ("{\"n\":0}", "n"),
            ("{\"n\":1000}", "n"),
            ("{\"temperature\":-1}", "temperature"),
            ("{\"top_p\":2}", "top_p"),
            ("{\"stop\":[1]}", "body.stop"),
            ("{\"stop\":\"\"}", "stop"),
            ("{\"logprobs\":true}", "logprobs"),
            ("{\"stop_token_ids\":[-4]}", "stop_token_ids"),
            ("{\"ignore_eos\":1}", "body.ignore_eos"),
        ] {
            assert_eq!(sampling(json).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }

    #[test]
    fn the_context_bounds_prompt_and_output() {
        let ids = [1; 10];
        let fits = |json: &str, max| {
            let made = sampling(json).unwrap().generations(&ids, Prefix::of(&ids), max);
            made.map(|choices| (choices.len(), complete(choices[0].clone(), u64::MAX).ids.len()))
        };
        let refused = |json: &str, max| fits(json, max).unwrap_err().param.unwrap();
        assert_eq!(fits("{\"max_tokens\":5,\"n\":3}", 15), Ok((3, 5)));
        assert_eq!(fits("{\"max_tokens\":6,\"ignore_eos\":true}", 15), Ok((1, 5)), "cut down");
        assert_eq!(refused("{\"max_tokens\":16}", 15), "max_tokens");
        assert_eq!(refused("{\"max_completion_tokens\":16,\"max_tokens\":5}", 15), "max_completion_tokens");
        assert_eq!(refused("{\"min_tokens\":9,\"max_tokens\":3}", 15), "min_tokens");
        assert_eq!(refused("{}", 10), "max_tokens", "nothing is left");
        let too_long = fits("{}", 9).unwrap_err();
        assert_eq!(too_long.param.as_deref(), Some("input_tokens"));
        assert!(too_long.message.contains("maximum context length is 9 tokens"));
        assert!(too_long.message.contains("at least 10 input tokens"));
    }

    #[test]
    fn stream_options_need_a_stream() {
        let options = Options::default();
        let both = "{\"stream_options\":{\"include_usage\":true,\"continuous_usage_stats\":true}}";
        let usage = StreamUsage::take(&mut fields(both), true, &options).unwrap();
        assert!(usage.at_end && usage.continuous);
        assert!(StreamUsage::take(&mut fields(both), false, &options).is_err());
        let only = "{\"stream_options\":{\"continuous_usage_stats\":true}}";
        assert!(!StreamUsage::take(&mut fields(only), true, &options).unwrap().continuous);
    }
}
