//! A request of `/v1/messages` as the chat completion that vLLM's adapter makes of it.

use serde_json::{Map, Value, json};

use super::super::{Refusal, body::Members, wire::quoted};

/// Settings that have the same name and form in both.
const SAME: [&str; 8] = [
    "model",
    "temperature",
    "top_p",
    "top_k",
    "watermarking",
    "cache_salt",
    "vllm_xargs",
    "chat_template_kwargs",
];

/// vLLM's adapter leaves such a block out of the prompt.
const BILLING: &str = "x-anthropic-billing-header";

/// The chat completion, less what makes it a continuation.
pub(super) struct Chat<'a> {
    original: &'a Members<'a>,
    messages: Vec<Value>,
    added: Vec<(&'static str, Vec<u8>)>,
}

impl<'a> Chat<'a> {
    /// Reads the request.
    pub(super) fn of(original: &'a Members<'a>) -> Result<Self, Refusal> {
        let mut chat = Self { original, messages: Vec::new(), added: Vec::new() };
        chat.system()?;
        let Some(Value::Array(messages)) = original.value("messages") else { return Err(Refusal::Body) };
        for message in &messages {
            chat.message(message)?;
        }
        chat.config()?;
        chat.tools()?;
        Ok(chat)
    }

    /// The body that continues the answer `seen`, for `left` tokens more.
    pub(super) fn continued(mut self, seen: &str, left: u64) -> Vec<u8> {
        self.messages.push(json!({"role": "assistant", "content": seen}));
        let mut body: Vec<(&str, Vec<u8>)> = Vec::new();
        for key in SAME {
            body.extend(self.original.raw(key).map(|value| (key, value.to_vec())));
        }
        body.extend(self.original.raw("stop_sequences").map(|value| ("stop", value.to_vec())));
        body.push(("messages", Value::Array(self.messages).to_string().into_bytes()));
        body.push(("max_tokens", left.to_string().into_bytes()));
        body.append(&mut self.added);
        body.push(("stream", b"true".to_vec()));
        body.push(("stream_options", br#"{"include_usage":true}"#.to_vec()));
        body.push(("continue_final_message", b"true".to_vec()));
        body.push(("add_generation_prompt", b"false".to_vec()));
        let mut out = vec![b'{'];
        for (i, (key, value)) in body.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            out.extend_from_slice(&quoted(key));
            out.push(b':');
            out.extend_from_slice(value);
        }
        out.push(b'}');
        out
    }

    fn system(&mut self) -> Result<(), Refusal> {
        let text = match self.original.value("system") {
            None => return Ok(()),
            Some(Value::String(text)) => text,
            Some(Value::Array(blocks)) => {
                let mut all = String::new();
                for block in &blocks {
                    let text = text_of(block)?.ok_or(Refusal::Body)?;
                    if !text.starts_with(BILLING) {
                        all.push_str(text);
                    }
                }
                all
            }
            Some(_) => return Err(Refusal::Body),
        };
        if !text.is_empty() {
            self.messages.push(json!({"role": "system", "content": text}));
        }
        Ok(())
    }

    fn message(&mut self, message: &Value) -> Result<(), Refusal> {
        // What vLLM does with a system message in between depends on the template, which is not known here.
        let role =
            message.get("role").and_then(Value::as_str).filter(|role| matches!(*role, "user" | "assistant"));
        let role = role.ok_or(Refusal::Body)?;
        let blocks = match message.get("content") {
            Some(Value::String(text)) => {
                self.messages.push(json!({"role": role, "content": text}));
                return Ok(());
            }
            Some(Value::Array(blocks)) => blocks,
            _ => return Err(Refusal::Body),
        };
        let (mut parts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), Vec::new());
        for block in blocks {
            match kind_of(block) {
                "text" => {
                    let text = text_of(block)?.unwrap_or_default();
                    if !text.is_empty() {
                        parts.push(json!({"type": "text", "text": text}));
                    }
                }
                "image" => parts.push(image(block)?),
                "thinking" => thoughts.extend(block.get("thinking").and_then(Value::as_str)),
                "redacted_thinking" => {}
                "tool_use" => calls.push(call(block)?),
                "tool_result" if role == "user" => self.tool_result(block)?,
                _ => return Err(Refusal::Body),
            }
        }
        let mut chat = Map::new();
        chat.insert("role".into(), role.into());
        if !thoughts.is_empty() {
            chat.insert("reasoning".into(), thoughts.concat().into());
        }
        if !calls.is_empty() {
            chat.insert("tool_calls".into(), calls.into());
        }
        match parts.as_slice() {
            [] if role == "user" => return Ok(()),
            [] => {}
            [only] if kind_of(only) == "text" => {
                chat.insert("content".into(), only.get("text").cloned().unwrap_or_default());
            }
            _ => {
                chat.insert("content".into(), parts.into());
            }
        }
        self.messages.push(chat.into());
        Ok(())
    }

    /// A tool's answer is a message of its own, before that of the user.
    fn tool_result(&mut self, block: &Value) -> Result<(), Refusal> {
        let (mut texts, mut images) = (Vec::new(), Vec::new());
        match block.get("content") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => texts.push(text.as_str()),
            Some(Value::Array(items)) => {
                for item in items {
                    match kind_of(item) {
                        "text" => texts.push(text_of(item)?.unwrap_or_default()),
                        "image" => images.push(image(item)?),
                        _ => return Err(Refusal::Body),
                    }
                }
            }
            Some(_) => return Err(Refusal::Body),
        }
        let id = block.get("tool_use_id").and_then(Value::as_str).unwrap_or_default();
        self.messages.push(json!({"role": "tool", "tool_call_id": id, "content": texts.join("\n")}));
        if !images.is_empty() {
            self.messages.push(json!({"role": "user", "content": images}));
        }
        Ok(())
    }

    fn config(&mut self) -> Result<(), Refusal> {
        let config = self.original.value("output_config").unwrap_or_default();
        if config.get("format").is_some_and(|format| !format.is_null()) {
            return Err(Refusal::StructuredOutput);
        }
        let thinking = self.original.value("thinking").unwrap_or_default();
        let effort = config.get("effort").and_then(Value::as_str);
        // A budget for thinking is spent once there is text.
        let effort = if kind_of(&thinking) == "disabled" { Some("none") } else { effort };
        self.added.extend(effort.map(|effort| ("reasoning_effort", quoted(effort))));
        Ok(())
    }

    fn tools(&mut self) -> Result<(), Refusal> {
        let choice = self.original.value("tool_choice").unwrap_or_default();
        let choice_is = match kind_of(&choice) {
            "none" => "none",
            "auto" | "" => "auto",
            // A call that must come is a grammar.
            _ => return Err(Refusal::StructuredOutput),
        };
        let tools = match self.original.value("tools") {
            None => return Ok(()),
            // A chat completion that names no tool may not choose one.
            Some(Value::Array(tools)) if tools.is_empty() => return Ok(()),
            Some(Value::Array(tools)) => tools,
            Some(_) => return Err(Refusal::Body),
        };
        let tools = tools.into_iter().map(tool).collect::<Result<Vec<_>, _>>()?;
        self.added.push(("tools", Value::Array(tools).to_string().into_bytes()));
        self.added.push(("tool_choice", quoted(choice_is)));
        if choice.is_object() {
            let alone = choice.get("disable_parallel_tool_use").and_then(Value::as_bool).unwrap_or_default();
            self.added.push(("parallel_tool_calls", (!alone).to_string().into_bytes()));
        }
        Ok(())
    }
}

fn kind_of(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// The text of a block of text; none if it is null.
fn text_of(block: &Value) -> Result<Option<&str>, Refusal> {
    match block.get("text") {
        _ if kind_of(block) != "text" => Err(Refusal::Body),
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Refusal::Body),
    }
}

fn image(block: &Value) -> Result<Value, Refusal> {
    let source = block.get("source").filter(|source| source.is_object()).ok_or(Refusal::Body)?;
    let field = |key, default| source.get(key).and_then(Value::as_str).unwrap_or(default);
    let url = if kind_of(source) == "url" {
        field("url", "").to_owned()
    } else {
        format!("data:{};base64,{}", field("media_type", "image/jpeg"), field("data", ""))
    };
    Ok(json!({"type": "image_url", "image_url": {"url": url}}))
}

fn call(block: &Value) -> Result<Value, Refusal> {
    // Without an id, vLLM makes one of the time of day.
    let id = block.get("id").and_then(Value::as_str).ok_or(Refusal::Body)?;
    let name = block.get("name").and_then(Value::as_str).unwrap_or_default();
    let input = block.get("input").filter(|input| input.is_object()).cloned().unwrap_or_else(|| json!({}));
    let function = json!({"name": name, "arguments": input.to_string()});
    Ok(json!({"id": id, "type": "function", "function": function}))
}

fn tool(tool: Value) -> Result<Value, Refusal> {
    let Value::Object(mut tool) = tool else { return Err(Refusal::Body) };
    let mut schema = tool.remove("input_schema").filter(Value::is_object).ok_or(Refusal::Body)?;
    if let Some(schema) = schema.as_object_mut().filter(|schema| !schema.contains_key("type")) {
        schema.insert("type".into(), "object".into());
    }
    let mut function = Map::new();
    function.insert("name".into(), tool.remove("name").filter(Value::is_string).ok_or(Refusal::Body)?);
    function.extend(tool.remove("description").map(|text| ("description".into(), text)));
    function.insert("parameters".into(), schema);
    for key in ["strict", "defer_loading"] {
        function.extend(tool.remove(key).map(|value| (key.into(), value)));
    }
    Ok(json!({"type": "function", "function": function}))
}
