//! Endpoints that do not generate: embeddings and scores, tokens, models, health, metrics, and the development paths.
//!
//! Embeddings and scores are deterministic functions of the text, of no meaning. The development paths (/sleep, /pause
//! and so on) exist only with `--sim-dev-mode`, as with vLLM's development mode; they are here so that a gateway can be
//! shown to keep them out of reach.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    VLLM_VERSION, audio, chat,
    error::ApiError,
    faults::FaultKind,
    http::{Head, Response},
    messages,
    record::unix_us,
    request::{Fields, room_after, token_ids},
    responses,
    state::{Engine, Phase},
    tokens::{self, Prefix},
};

/// Numbers in an embedding.
const EMBEDDING_LENGTH: u64 = 64;

/// True for paths that faults may hit beside those that generate.
pub(super) fn is_inference(path: &str) -> bool {
    path.starts_with("/v1/")
        || path.starts_with("/v2/")
        || matches!(path, "/score" | "/rerank" | "/pooling" | "/classify" | "/tokenize" | "/detokenize")
}

/// Answers a request for anything that does not generate.
pub(super) async fn answer(engine: &Engine, head: &Head, path: &str, body: Bytes) -> Response {
    let method = head.method();
    if engine.options.sim.dev_mode
        && let Some(response) = development(engine, method, path, head)
    {
        return response;
    }
    match (method, path) {
        ("GET", "/health") => health(engine),
        ("GET" | "POST", "/ping") => health(engine),
        ("GET", "/metrics") => metrics(engine),
        ("GET", "/version") => Response::json(200, json!({"version": VLLM_VERSION}).to_string()),
        ("GET", "/load") => {
            Response::json(200, json!({"server_load": engine.tracked.load(Ordering::Relaxed)}).to_string())
        }
        ("GET", "/v1/models") => models(engine),
        ("POST", "/v1/embeddings") => json_answer(embeddings, engine, head, body),
        ("POST", "/v1/rerank" | "/v2/rerank" | "/rerank") => json_answer(rerank, engine, head, body),
        ("POST", "/v1/score" | "/score") => json_answer(score, engine, head, body),
        ("POST", "/pooling") => json_answer(pooling, engine, head, body),
        ("POST", "/classify") => json_answer(classify, engine, head, body),
        ("POST", "/v1/audio/transcriptions" | "/v1/audio/translations") => {
            audio::transcribe(head, &body, &engine.options)
        }
        ("POST", "/v1/audio/speech") => Fields::parse(head, &body)
            .and_then(|fields| audio::speak(fields, &engine.options))
            .unwrap_or_else(|error| refused(&error)),
        ("POST", "/tokenize") => json_answer(tokenize, engine, head, body),
        ("POST", "/detokenize") => json_answer(detokenize, engine, head, body),
        ("POST", "/v1/messages/count_tokens") => count_tokens(engine, head, body),
        (_, path) if path.starts_with("/v1/responses/") => stored_response(method, path),
        (_, path) if exists(path) => Response {
            headers: "allow: POST\r\n".into(),
            ..Response::json(405, "{\"detail\":\"Method Not Allowed\"}")
        },
        (_, path) if path.starts_with("/inference/v1/") || path.ends_with("/render") => {
            let message = "This endpoint is only available with --enable-scale-out";
            refused(&ApiError { status: 403, kind: "PermissionDeniedError", ..ApiError::bad("", message) })
        }
        _ => Response::json(404, "{\"detail\":\"Not Found\"}"),
    }
}

/// Paths of this API, for some method.
pub(super) fn exists(path: &str) -> bool {
    matches!(
        path,
        "/v1/chat/completions"
            | "/v1/completions"
            | "/v1/responses"
            | "/v1/messages"
            | "/v1/messages/count_tokens"
            | "/v1/embeddings"
            | "/v1/rerank"
            | "/v2/rerank"
            | "/rerank"
            | "/v1/score"
            | "/score"
            | "/pooling"
            | "/classify"
            | "/v1/audio/transcriptions"
            | "/v1/audio/translations"
            | "/v1/audio/speech"
            | "/v1/realtime"
            | "/tokenize"
            | "/detokenize"
            | "/health"
            | "/ping"
            | "/metrics"
            | "/version"
            | "/load"
            | "/v1/models"
    )
}

fn refused(error: &ApiError) -> Response {
    Response::json(error.status, error.openai_body())
}

fn json_answer(
    endpoint: fn(&Engine, Fields) -> Result<Value, ApiError>,
    engine: &Engine,
    head: &Head,
    body: Bytes,
) -> Response {
    match Fields::parse(head, &body).and_then(|fields| endpoint(engine, fields)) {
        Ok(value) => Response::json(200, value.to_string()),
        Err(error) => refused(&error),
    }
}

fn health(engine: &Engine) -> Response {
    let healthy = engine.phase() != Phase::Dead && !engine.has_fault(FaultKind::Unhealthy);
    Response { status: if healthy { 200 } else { 503 }, ..Response::empty() }
}

fn metrics(engine: &Engine) -> Response {
    match engine.metrics.render(&engine.scheduler.load(), engine.sleeping.load(Ordering::Relaxed)) {
        Ok(text) => {
            Response { content_type: "text/plain; version=0.0.4; charset=utf-8", ..Response::text(200, text) }
        }
        Err(e) => Response::text(500, e.to_string()),
    }
}

fn models(engine: &Engine) -> Response {
    let options = &engine.options;
    let created = unix_us() / 1_000_000;
    let names = if options.served_names.is_empty() {
        std::slice::from_ref(&options.model)
    } else {
        &options.served_names
    };
    let card = |id: &str, root: &str, parent: Option<&str>| {
        json!({
            "id": id, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent,
            "max_model_len": parent.is_none().then_some(options.max_model_len),
            "permission": [{
                "id": format!("modelperm-{:016x}", xxhash_rust::xxh3::xxh3_64(id.as_bytes())),
                "object": "model_permission", "created": created, "allow_create_engine": false,
                "allow_sampling": true, "allow_logprobs": true, "allow_search_indices": false, "allow_view": true,
                "allow_fine_tuning": false, "organization": "*", "group": null, "is_blocking": false,
            }],
        })
    };
    let mut data: Vec<Value> = names.iter().map(|name| card(name, &options.model, None)).collect();
    data.extend(options.adapters.iter().map(|(name, path)| card(name, path, Some(options.served_name()))));
    Response::json(200, json!({"object": "list", "data": data}).to_string())
}

/// The texts or token lists of `input`, as ids.
fn inputs(value: Option<Value>, field: &str) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = || ApiError::invalid("string_type", field, "Input should be a valid string or list");
    match value {
        None => Err(ApiError::invalid("missing", field, "Field required")),
        Some(Value::String(text)) => Ok(vec![tokens::encoded(&text)]),
        Some(Value::Array(items)) if items.first().is_some_and(Value::is_number) => {
            Ok(vec![token_ids(&items, field)?])
        }
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(tokens::encoded(text)),
                Value::Array(ids) => token_ids(ids, field),
                Value::Object(part) => match part.get("text").and_then(Value::as_str) {
                    Some(text) => Ok(tokens::encoded(text)),
                    None => Err(wrong()),
                },
                _ => Err(wrong()),
            })
            .collect(),
        Some(_) => Err(wrong()),
    }
}

/// A number from 0 to 1, of 24 random bits.
fn unit(seed: u64) -> f64 {
    (tokens::finish(seed) >> 40) as f64 / f64::from(1 << 24)
}

fn object(
    engine: &Engine,
    prefix: &str,
    kind: &str,
    model: &str,
    data: Vec<Value>,
    prompt_tokens: u64,
) -> Value {
    engine.metrics.prompt_tokens.inc_by(prompt_tokens);
    json!({
        "id": format!("{prefix}-{:016x}", fastrand::u64(..)), "object": kind, "created": unix_us() / 1_000_000,
        "model": model, "data": data,
        "usage": {
            "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens, "completion_tokens": 0,
            "prompt_tokens_details": null,
        },
    })
}

fn embeddings(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    let model = fields.model(&engine.options)?;
    let length = match fields.int("dimensions")? {
        None => EMBEDDING_LENGTH,
        Some(n) => u64::try_from(n).ok().filter(|n| (1..=4096).contains(n)).ok_or_else(|| {
            ApiError::bad("dimensions", format!("dimensions must be from 1 to 4096, got {n}"))
        })?,
    };
    let base64 = match fields.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(ApiError::bad("encoding_format", format!("`{other}` is neither float nor base64")));
        }
    };
    let inputs = inputs(fields.take("input"), "input")?;
    let mut prompt_tokens = 0;
    let mut data = Vec::with_capacity(inputs.len());
    for (index, ids) in inputs.iter().enumerate() {
        let prefix = Prefix::of(ids);
        room_after(prefix.len(), engine.options.max_model_len)?;
        prompt_tokens += prefix.len();
        let numbers: Vec<f64> =
            (0..length).map(|i| unit(prefix.hash().wrapping_add(i)) * 2.0 - 1.0).collect();
        let norm = numbers.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        #[allow(clippy::cast_possible_truncation)] // Embeddings are single precision.
        let unit_vector: Vec<f32> = numbers.iter().map(|x| (x / norm) as f32).collect();
        let embedding = if base64 { json!(base64_floats(&unit_vector)) } else { json!(unit_vector) };
        data.push(json!({"index": index, "object": "embedding", "embedding": embedding}));
    }
    Ok(object(engine, "embd", "list", &model, data, prompt_tokens))
}

/// Little-endian floats in base64, as OpenAI's clients ask for by default.
fn base64_floats(numbers: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len() * 4 / 3 + 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, &b| word << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let letter = ALPHABET[(word >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

/// How well a text answers a query: a number from 0 to 1 that depends on both.
fn relevance(query: &[u32], text: &[u32]) -> f64 {
    unit(Prefix::of(&[query, &[tokens::IM_END], text].concat()).hash())
}

fn rerank(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    let model = fields.model(&engine.options)?;
    let query =
        fields.string("query")?.ok_or_else(|| ApiError::invalid("missing", "query", "Field required"))?;
    let documents = fields.take("documents");
    let texts: Vec<Value> = documents.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
    let documents = inputs(documents, "documents")?;
    let top = match fields.int("top_n")? {
        None | Some(0) => documents.len(),
        Some(n) => usize::try_from(n)
            .map_err(|_| ApiError::bad("top_n", format!("top_n must be at least 0, got {n}")))?,
    };
    let query = tokens::encoded(&query);
    let prompt_tokens: usize = documents.iter().map(|d| d.len() + query.len()).sum();
    let mut results: Vec<(usize, f64)> = documents.iter().map(|d| relevance(&query, d)).enumerate().collect();
    results.sort_by(|a, b| b.1.total_cmp(&a.1));
    let results: Vec<Value> = results
        .into_iter()
        .take(top)
        .map(|(index, score)| json!({"index": index, "document": {"text": texts.get(index)}, "relevance_score": score}))
        .collect();
    Ok(json!({
        "id": format!("rerank-{:016x}", fastrand::u64(..)), "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}, "results": results,
    }))
}

fn score(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    let model = fields.model(&engine.options)?;
    let (first, second) =
        (inputs(fields.take("text_1"), "text_1")?, inputs(fields.take("text_2"), "text_2")?);
    if first.len() != second.len() && first.len() != 1 {
        return Err(ApiError::bad("text_1", "text_1 must be one text, or as many as text_2"));
    }
    let queries = first.iter().cycle();
    let data = queries.zip(&second).enumerate().map(
        |(index, (query, text))| json!({"index": index, "object": "score", "score": relevance(query, text)}),
    );
    let data: Vec<Value> = data.collect();
    let prompt_tokens = first.iter().chain(&second).map(|ids| ids.len() as u64).sum();
    Ok(object(engine, "score", "list", &model, data, prompt_tokens))
}

fn pooling(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    let model = fields.model(&engine.options)?;
    let inputs = inputs(fields.take("input"), "input")?;
    let vector = |ids: &Vec<u32>| -> Vec<f64> { ids.iter().map(|&id| unit(u64::from(id))).collect() };
    let data = inputs.iter().enumerate();
    let data = data.map(|(index, ids)| json!({"index": index, "object": "pooling", "data": vector(ids)}));
    let prompt_tokens = inputs.iter().map(|ids| ids.len() as u64).sum();
    Ok(object(engine, "pool", "list", &model, data.collect(), prompt_tokens))
}

fn classify(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    let model = fields.model(&engine.options)?;
    let inputs = inputs(fields.take("input"), "input")?;
    let class = |(index, ids): (usize, &Vec<u32>)| {
        let p = unit(Prefix::of(ids).hash());
        let label = if p < 0.5 { "LABEL_0" } else { "LABEL_1" };
        json!({"index": index, "label": label, "probs": [1.0 - p, p], "num_classes": 2})
    };
    let prompt_tokens = inputs.iter().map(|ids| ids.len() as u64).sum();
    let data = inputs.iter().enumerate().map(class).collect();
    Ok(object(engine, "classify", "list", &model, data, prompt_tokens))
}

fn tokenize(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    fields.model(&engine.options)?;
    let ids = match fields.string("prompt")? {
        Some(text) => tokens::encoded(&text),
        None => chat::asked(&mut fields, &engine.options)?.ids,
    };
    let words = fields
        .flag("return_token_strs")?
        .then(|| ids.iter().map(|&id| tokens::shown(&[id])).collect::<Vec<_>>());
    Ok(
        json!({"count": ids.len(), "max_model_len": engine.options.max_model_len, "tokens": ids, "token_strs": words}),
    )
}

fn detokenize(engine: &Engine, mut fields: Fields) -> Result<Value, ApiError> {
    fields.model(&engine.options)?;
    match fields.take("tokens") {
        Some(Value::Array(items)) => Ok(json!({"prompt": tokens::shown(&token_ids(&items, "tokens")?)})),
        Some(_) => Err(ApiError::invalid("list_type", "tokens", "Input should be a valid list")),
        None => Err(ApiError::invalid("missing", "tokens", "Field required")),
    }
}

fn count_tokens(engine: &Engine, head: &Head, body: Bytes) -> Response {
    match Fields::parse(head, &body).and_then(|fields| messages::count_tokens(fields, &engine.options)) {
        Ok(text) => Response::json(200, text),
        Err(error) => Response::json(error.status, error.anthropic_body()),
    }
}

fn stored_response(method: &str, path: &str) -> Response {
    let rest = path.strip_prefix("/v1/responses/").unwrap_or("");
    match (method, rest.strip_suffix("/cancel")) {
        ("POST", Some(id)) => refused(&responses::not_stored(id)),
        ("GET", None) => refused(&responses::not_stored(rest)),
        _ => Response::json(405, "{\"detail\":\"Method Not Allowed\"}"),
    }
}

/// The development paths; none if `path` is not one of them.
fn development(engine: &Engine, method: &str, path: &str, head: &Head) -> Option<Response> {
    let sleep = |asleep: bool| {
        engine.sleeping.store(asleep, Ordering::Relaxed);
        engine.scheduler.pause(asleep);
    };
    let status = |text: &str| Response::json(200, json!({"status": text}).to_string());
    let sleeping = engine.sleeping.load(Ordering::Relaxed);
    let response = match (method, path) {
        ("POST", "/sleep") => {
            sleep(true);
            let level = head.query("level").and_then(|l| l.parse::<u8>().ok()).unwrap_or(1);
            Response::json(200, json!({"status": "sleeping", "level": level}).to_string())
        }
        // Weights alone are not enough to serve: it sleeps until the rest is there, too.
        ("POST", "/wake_up") => {
            if head.query("tags").is_none_or(|tags| tags.split(',').any(|tag| tag == "kv_cache")) {
                sleep(false);
            }
            status("awake")
        }
        ("POST", "/collective_rpc") => Response::json(200, json!({"results": [null]}).to_string()),
        ("POST", "/pause") => {
            sleep(true);
            status("paused")
        }
        ("POST", "/resume") => {
            sleep(false);
            status("resumed")
        }
        ("GET", "/is_sleeping") => Response::json(200, json!({"is_sleeping": sleeping}).to_string()),
        ("GET", "/is_paused") => Response::json(200, json!({"is_paused": sleeping}).to_string()),
        ("POST", "/reset_prefix_cache") => {
            engine.scheduler.reset_prefix_cache();
            Response::empty()
        }
        ("GET", "/server_info") => Response::json(
            200,
            json!({"vllm_config": format!("model={:?}", engine.options.model)}).to_string(),
        ),
        _ => return None,
    };
    Some(response)
}
