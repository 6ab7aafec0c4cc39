//! What the next engine is asked for the rest of a chat or text completion.

use serde_json::Value;

use super::{
    Answers, Ask, NoPlan, Question, Refusal,
    body::Members,
    chunks::Seen,
    sample::ids_json,
    seam::Seam,
    stitch::{Form, Merge, Stitch},
    stop::Stops,
    tracker::Plan,
    wire::Seam as Gap,
};

/// How far behind the last id a whole character may end: its bytes are at most four, and a token has at least one.
const MOST_UNFINISHED: usize = 8;

/// vLLM's default of `max_tokens` for text completions (`entrypoints/openai/completion/protocol.py`).
const COMPLETION_TOKENS: u64 = 16;

/// Members that count the output's tokens, or say something of the request's form that its continuation has otherwise.
const OF_THE_BEGINNING: [&str; 9] = [
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stream",
    "return_token_ids",
    "prompt_logprobs",
    "return_prompt_text",
    "truncate_prompt_tokens",
    "echo",
];

/// Members of a chat that mean nothing to a text completion.
const OF_A_CHAT: [&str; 19] = [
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "logprobs",
    "top_logprobs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "include_reasoning",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "modalities",
    "stop",
];

/// Settings that look back at the output in ways of their own, or carry state of an engine.
const LOOKING_BACK: [&str; 8] = [
    "bad_words",
    "repetition_detection",
    "thinking_token_budget",
    "logits_processors",
    "vllm_xargs",
    "kv_transfer_params",
    "ec_transfer_params",
    "structural_tag",
];

/// How a stream of chunks goes on.
///
/// # Errors
/// What must be known before, or why it may not.
pub(super) fn plan(seen: &Seen, original: &Members<'_>, answers: &Answers) -> Result<Plan, NoPlan> {
    if !seen.is_visible() {
        return Ok(again(seen, original));
    }
    check(seen, original)?;
    if by_ids(seen, original) {
        with_ids(seen, original, answers)
    } else {
        with_text(seen, original, answers)
    }
}

/// Nothing of the answer was seen: the whole request again.
fn again(seen: &Seen, original: &Members<'_>) -> Plan {
    let path = if seen.wishes().chat { "/v1/chat/completions" } else { "/v1/completions" };
    let ask = Ask { path, body: original.write(&[], &[]), recomputed: 0 };
    Plan { ask, seam: seam(Stitch::new(seen.names.clone(), Form::Native, Merge::default())), kept: 0 }
}

fn seam(stitch: Stitch) -> Seam {
    Seam::Chunks(Box::new(stitch))
}

/// Whether a continuation can be right at all.
fn check(seen: &Seen, original: &Members<'_>) -> Result<(), Refusal> {
    let more_than_one = |key| original.count(key).is_some_and(|n| n > 1);
    if seen.several || more_than_one("n") || more_than_one("best_of") || has_several_prompts(original) {
        return Err(Refusal::SeveralChoices);
    }
    if original.is_set("use_beam_search") {
        return Err(Refusal::BeamSearch);
    }
    let format = original.value("response_format");
    let free = |format: &Value| format.get("type").and_then(Value::as_str) == Some("text");
    let forced = original.value("tool_choice").is_some_and(|choice| choice != "auto" && choice != "none");
    let guided = ["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"];
    if format.is_some_and(|format| !free(&format)) || forced || guided.iter().any(|key| original.is_set(key))
    {
        return Err(Refusal::StructuredOutput);
    }
    if original.is_nonzero("presence_penalty") || original.is_nonzero("frequency_penalty") {
        return Err(Refusal::OutputPenalties);
    }
    if LOOKING_BACK.iter().any(|key| original.is_set(key)) {
        return Err(Refusal::OutputState);
    }
    if original.is_set("prompt_embeds") {
        return Err(Refusal::PromptEmbeddings);
    }
    match () {
        () if seen.tool_call => Err(Refusal::ToolCall),
        () if seen.reasoning => Err(Refusal::Reasoning),
        () if seen.unknown || seen.names.is_none() => Err(Refusal::Unreadable),
        () => Ok(()),
    }
}

fn has_several_prompts(original: &Members<'_>) -> bool {
    match original.value("prompt") {
        Some(Value::Array(prompts)) => prompts.len() > 1 && !prompts.iter().all(Value::is_number),
        _ => false,
    }
}

/// Whether ids say all that the engine had for a prompt, and the answer's text is all that comes.
fn by_ids(seen: &Seen, original: &Members<'_>) -> bool {
    let told = !seen.prompt.is_empty() && !seen.without_ids;
    let text_only = !seen.wishes().chat
        || seen.sample.is_some()
            && !original.flag("logprobs")
            && !may_call_tools(original)
            && !has_other_parts(original);
    told && text_only
}

fn may_call_tools(original: &Members<'_>) -> bool {
    original.is_set("tools") && original.raw("tool_choice") != Some(b"\"none\"")
}

/// Whether a message has parts that are no text: ids do not hold them.
fn has_other_parts(original: &Members<'_>) -> bool {
    let Some(Value::Array(messages)) = original.value("messages") else { return true };
    let is_text = |part: &Value| {
        part.is_string() || part.get("type").and_then(Value::as_str).is_some_and(|kind| kind == "text")
    };
    messages
        .iter()
        .filter_map(|message| message.get("content")?.as_array())
        .flatten()
        .any(|part| !is_text(part))
}

/// The strings that end the answer.
fn stops(original: &Members<'_>) -> Vec<String> {
    let strings = match original.value("stop") {
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(stops)) => {
            stops.into_iter().filter_map(|stop| stop.as_str().map(str::to_owned)).collect()
        }
        _ => Vec::new(),
    };
    strings.into_iter().filter(|stop| !stop.is_empty()).collect()
}

/// The delivered text, decoded.
fn delivered(seen: &Seen) -> Result<String, Refusal> {
    let quoted = [b"\"", &seen.text[..], b"\""].concat();
    serde_json::from_slice(&quoted).map_err(|_| Refusal::Unreadable)
}

/// The prompt's ids and those of the answer so far are the prompt.
fn with_ids(seen: &Seen, original: &Members<'_>, answers: &Answers) -> Result<Plan, NoPlan> {
    let strings = stops(original);
    let kept = match strings.is_empty() && seen.sure {
        true => seen.whole,
        false => last_whole(seen, answers)?,
    };
    let stops = match strings.is_empty() {
        true => None,
        false => Some(after_the_cut(seen, original, strings, kept, answers)?),
    };
    let left = tokens_left(seen, original, kept, answers)?;
    let min = original.count("min_tokens").unwrap_or(0).saturating_sub(kept as u64);
    let ids = seen.ids.get(..kept).unwrap_or_default();
    let mut added = vec![
        ("prompt", ids_json(&[&seen.prompt, ids].concat())),
        ("stream", b"true".to_vec()),
        ("return_token_ids", b"true".to_vec()),
        ("max_tokens", left.to_string().into_bytes()),
    ];
    if min > 0 {
        added.push(("min_tokens", min.to_string().into_bytes()));
    }
    let mut without = OF_THE_BEGINNING.to_vec();
    if seen.wishes().chat {
        without.extend(OF_A_CHAT);
    }
    if stops.is_some() {
        without.push("stop");
    }
    let ask = Ask {
        path: "/v1/completions",
        body: original.write(&without, &added),
        recomputed: (seen.prompt.len() + kept) as u64,
    };
    let form = match &seen.sample {
        Some(sample) if seen.wishes().chat || stops.is_some() => Form::Sample(sample.clone()),
        _ if stops.is_some() => return Err(Refusal::OutputState.into()),
        _ => Form::Native,
    };
    let merge = Merge {
        before: kept as u64,
        prompt: Some(seen.prompt.len() as u64),
        characters: delivered(seen)?.chars().count() as u64,
    };
    let mut stitch = Stitch::new(seen.names.clone(), form, merge);
    if let Some(stops) = stops {
        let usage = original
            .value("stream_options")
            .is_some_and(|options| options.get("include_usage") == Some(&Value::Bool(true)));
        stitch = stitch.stopping_at(stops, min, usage);
    }
    Ok(Plan { ask, seam: seam(stitch), kept })
}

/// How many of the ids end with a whole character.
fn last_whole(seen: &Seen, answers: &Answers) -> Result<usize, NoPlan> {
    let (all, given) = (seen.ids.len(), delivered(seen)?);
    for count in (all.saturating_sub(MOST_UNFINISHED)..=all).rev() {
        let Some((_, text)) = answers.texts.iter().find(|(asked, _)| *asked == count) else {
            return Err(NoPlan::Asks(Question::Text(seen.ids.get(..count).unwrap_or_default().to_vec())));
        };
        // What ends so and was delivered is what the model said.
        if !text.ends_with(char::REPLACEMENT_CHARACTER) || *text == given {
            return Ok(count);
        }
    }
    Err(Refusal::Unreadable.into())
}

/// The stop strings, and what of the text they have to be looked for in.
fn after_the_cut(
    seen: &Seen,
    original: &Members<'_>,
    strings: Vec<String>,
    kept: usize,
    answers: &Answers,
) -> Result<Stops, Refusal> {
    let given = delivered(seen)?;
    let (_, text) = answers.texts.iter().find(|(asked, _)| *asked == kept).ok_or(Refusal::Unreadable)?;
    // Decoders that put a space before each word leave out the very first.
    let held = text.strip_prefix(&*given).or_else(|| text.strip_prefix(given.strip_prefix(' ')?));
    let include = original.flag("include_stop_str_in_output");
    Ok(Stops::new(strings, include, &given, held.ok_or(Refusal::Mismatch)?))
}

/// Tokens that may still be generated, after `kept`.
fn tokens_left(seen: &Seen, original: &Members<'_>, kept: usize, answers: &Answers) -> Result<u64, NoPlan> {
    let wanted = match seen.wishes().chat {
        true => original.count("max_completion_tokens").or_else(|| original.count("max_tokens")),
        false => Some(original.count("max_tokens").unwrap_or(COMPLETION_TOKENS)),
    };
    let left = match wanted {
        Some(wanted) => wanted.checked_sub(kept as u64),
        None => {
            let context = answers.context.ok_or(NoPlan::Asks(Question::Context))?;
            context.checked_sub((seen.prompt.len() + kept) as u64)
        }
    };
    left.filter(|left| *left > 0).ok_or(NoPlan::Refused(Refusal::Mismatch))
}

/// The text so far is the beginning of the answer.
fn with_text(seen: &Seen, original: &Members<'_>, answers: &Answers) -> Result<Plan, NoPlan> {
    let text = delivered(seen)?;
    if original.flag("include_stop_str_in_output") && !stops(original).is_empty() {
        return Err(Refusal::OutputState.into());
    }
    // What a chat's template would do with white space at the end nobody can tell.
    let (told, gap) = if seen.wishes().chat { Gap::of(&text) } else { (&*text, Gap::default()) };
    let counted = !seen.without_ids && !seen.prompt.is_empty() && gap.is_closed();
    let before = match (counted, answers.tokens) {
        (true, _) => seen.whole as u64,
        (false, Some(tokens)) => tokens,
        (false, None) => return Err(NoPlan::Asks(Question::Tokens(told.to_owned()))),
    };
    let mut added = vec![("stream", b"true".to_vec())];
    if !seen.prompt.is_empty() {
        added.push(("return_token_ids", b"true".to_vec()));
    }
    let limits: &[&str] =
        if seen.wishes().chat { &["max_completion_tokens", "max_tokens"] } else { &["max_tokens"] };
    let default = (!seen.wishes().chat).then_some(COMPLETION_TOKENS);
    let limit = limits.iter().find_map(|key| original.count(key)).or(default);
    if let Some(limit) = limit {
        let left = limit.checked_sub(before).filter(|left| *left > 0).ok_or(Refusal::Mismatch)?;
        added.push(("max_tokens", left.to_string().into_bytes()));
    }
    let min = original.count("min_tokens").unwrap_or(0).saturating_sub(before);
    if min > 0 {
        added.push(("min_tokens", min.to_string().into_bytes()));
    }
    if seen.wishes().chat {
        added.push(("messages", continued(original, told)?));
        added.push(("continue_final_message", b"true".to_vec()));
        added.push(("add_generation_prompt", b"false".to_vec()));
    } else {
        let Some(Value::String(prompt)) = original.value("prompt") else { return Err(Refusal::Body.into()) };
        // With `echo` the prompt is the beginning of what was seen.
        let whole = if original.is_set("echo") { told.to_owned() } else { [&*prompt, told].concat() };
        added.push(("prompt", Value::String(whole).to_string().into_bytes()));
    }
    let prompt = seen.prompt.len() as u64;
    let merge =
        Merge { before, prompt: (prompt > 0).then_some(prompt), characters: text.chars().count() as u64 };
    let path = if seen.wishes().chat { "/v1/chat/completions" } else { "/v1/completions" };
    let ask = Ask { path, body: original.write(&OF_THE_BEGINNING, &added), recomputed: prompt + before };
    let stitch = Stitch::new(seen.names.clone(), Form::Native, merge).behind(gap);
    Ok(Plan { ask, seam: seam(stitch), kept: if seen.without_ids { seen.ids.len() } else { seen.whole } })
}

/// The messages with the text so far as the last of them, which is not closed.
fn continued(original: &Members<'_>, text: &str) -> Result<Vec<u8>, Refusal> {
    let Some(Value::Array(mut messages)) = original.value("messages") else { return Err(Refusal::Body) };
    if original.flag("continue_final_message") {
        let last = messages.last_mut().and_then(|message| message.get_mut("content")).ok_or(Refusal::Body)?;
        let Value::String(begun) = last else { return Err(Refusal::Body) };
        begun.push_str(text);
    } else {
        messages.push(serde_json::json!({"role": "assistant", "content": text}));
    }
    Ok(Value::Array(messages).to_string().into_bytes())
}
