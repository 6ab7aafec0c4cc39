//! The request of a response, with the answer so far as its last input item.

use serde_json::{Value, json};

use super::super::{Refusal, body::Members};

/// Whether another engine can answer the request at all.
pub(super) fn portable(original: &Members<'_>) -> Result<(), Refusal> {
    let elsewhere = [
        "previous_response_id",
        "conversation",
        "kv_transfer_params",
        "ec_transfer_params",
        "previous_input_messages",
    ];
    if original.flag("background") || elsewhere.iter().any(|key| original.raw(key).is_some()) {
        return Err(Refusal::EngineState);
    }
    Ok(())
}

/// Whether an answer to the request can be continued in its middle.
pub(super) fn continuable(original: &Members<'_>) -> Result<(), Refusal> {
    let text = original.value("text").unwrap_or_default();
    let format = text.get("format").and_then(|format| format.get("type")).and_then(Value::as_str);
    if original.raw("structured_outputs").is_some() || !matches!(format, None | Some("text")) {
        return Err(Refusal::StructuredOutput);
    }
    if original.is_nonzero("presence_penalty") || original.is_nonzero("frequency_penalty") {
        return Err(Refusal::OutputPenalties);
    }
    let include = original.value("include").unwrap_or_default();
    let includes = |what: &str| include.as_array().is_some_and(|items| items.iter().any(|item| item == what));
    // The parts at the end list the log probabilities of the whole text, in more detail than the deltas do.
    if includes("message.output_text.logprobs") || original.flag("enable_response_messages") {
        return Err(Refusal::OutputState);
    }
    if original.raw("include_reasoning") == Some(b"false") {
        return Err(Refusal::Reasoning);
    }
    tools(original)
}

fn tools(original: &Members<'_>) -> Result<(), Refusal> {
    let tools = match original.value("tools") {
        None => return Ok(()),
        Some(Value::Array(tools)) => tools,
        Some(_) => return Err(Refusal::Body),
    };
    if tools
        .iter()
        .any(|tool| !matches!(tool.get("type").and_then(Value::as_str), Some("function" | "custom")))
    {
        return Err(Refusal::ToolCall);
    }
    match original.value("tool_choice") {
        _ if tools.is_empty() => Ok(()),
        None => Ok(()),
        Some(Value::String(choice)) if matches!(choice.as_str(), "auto" | "none") => Ok(()),
        // A call that must come is a grammar.
        Some(_) => Err(Refusal::StructuredOutput),
    }
}

/// The input with `seen` behind it, as the beginning of the answer.
pub(super) fn input(original: &Members<'_>, seen: &str) -> Result<Vec<u8>, Refusal> {
    let raw = original.raw("input").ok_or(Refusal::Body)?;
    let mut out = match original.value("input") {
        Some(Value::String(_)) => [br#"[{"type":"message","role":"user","content":"#, raw, b"}"].concat(),
        Some(Value::Array(items)) => {
            let last = items.last().ok_or(Refusal::Body)?;
            if !is_closed(last) {
                return Err(Refusal::Body);
            }
            raw.strip_suffix(b"]").ok_or(Refusal::Body)?.to_vec()
        }
        _ => return Err(Refusal::Body),
    };
    let item = json!({
        "type": "message", "role": "assistant", "status": "in_progress",
        "content": [{"type": "output_text", "text": seen, "annotations": []}],
    });
    out.push(b',');
    out.extend_from_slice(item.to_string().as_bytes());
    out.push(b']');
    Ok(out)
}

/// Whether an answer is not put into the same message as `item`: vLLM merges what one turn of the assistant is made of.
fn is_closed(item: &Value) -> bool {
    let field = |key| item.get(key).and_then(Value::as_str);
    let open = matches!(field("status"), Some("in_progress" | "incomplete"));
    let merged = matches!(field("type"), Some("function_call" | "custom_tool_call" | "reasoning"));
    !open && !merged
}
