//! News of engines' loads on the same stream: asked for, handed on, and answered, apart from the state.
//!
//! What a response tells of an engine is handed on even if something else in it is wrong: each load stands for itself and is
//! replaced within a second. A refusal is still told, with its reasons, for whoever looks for the defect. Nothing of this
//! touches [`XdsState`], its versions or the file on disk.
//!
//! Control planes of before there were loads end the stream when they are asked for them; see [`is_refusal`].

use penstock_proto::{
    Version, v1,
    xds::{DeltaDiscoveryResponse, ENGINE_LOAD_TYPE},
};
use prost::Message;

use crate::xds::state::XdsState;

/// Takes each load: its resource's name, and what is told.
pub type LoadSink = Box<dyn Fn(&str, &v1::EngineLoad) + Send + Sync>;

/// Reasons given in one NACK.
const MAX_REASONS: usize = 5;

/// Whether a stream ended because the other side does not know of loads.
pub(super) fn is_refusal(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::InvalidArgument && status.message().contains(ENGINE_LOAD_TYPE)
}

/// Hands on what a response tells.
///
/// # Errors
/// What was wrong with it, as sentences; what was not wrong has been handed on, unless the whole is of an older term.
pub(super) fn take(
    response: &DeltaDiscoveryResponse,
    state: &XdsState,
    sink: &LoadSink,
) -> Result<(), Vec<String>> {
    let version: Version = response.system_version_info.parse().map_err(|e| vec![format!("{e}")])?;
    let known = state.version();
    if version.term < known.term {
        return Err(vec![format!("loads of term {} are older than {known}", version.term)]);
    }
    let mut reasons = Vec::new();
    for resource in &response.resources {
        let name = &resource.name;
        let Some(any) = resource.resource.as_ref().filter(|any| any.type_url == ENGINE_LOAD_TYPE) else {
            reasons.push(format!("load {name:?} has no content of its type"));
            continue;
        };
        match v1::EngineLoad::decode(any.value.as_slice()) {
            Ok(load) => sink(name, &load),
            Err(error) => reasons.push(format!("load {name:?} cannot be decoded: {error}")),
        }
    }
    if reasons.is_empty() {
        return Ok(());
    }
    let more = reasons.len().saturating_sub(MAX_REASONS);
    reasons.truncate(MAX_REASONS);
    if more > 0 {
        reasons.push(format!("and {more} more"));
    }
    Err(reasons)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use penstock_proto::xds::{Any, Resource};

    use super::*;

    fn resource(name: &str, value: Vec<u8>) -> Resource {
        let any = Any { type_url: ENGINE_LOAD_TYPE.into(), value };
        Resource { name: name.into(), resource: Some(any), ..Default::default() }
    }

    fn heard(
        response: &DeltaDiscoveryResponse,
        state: &XdsState,
    ) -> (Vec<(String, u32)>, Result<(), Vec<String>>) {
        let heard = Arc::<Mutex<Vec<(String, u32)>>>::default();
        let noted = Arc::clone(&heard);
        let sink: LoadSink =
            Box::new(move |name, load| noted.lock().unwrap().push((name.to_owned(), load.running)));
        let result = take(response, state, &sink);
        (heard.lock().unwrap().clone(), result)
    }

    fn nowhere() -> LoadSink {
        Box::new(|_, _| {})
    }

    #[test]
    fn one_that_is_broken_does_not_hold_the_others_back() {
        let load = v1::EngineLoad { running: 3, ..Default::default() };
        let response = DeltaDiscoveryResponse {
            system_version_info: "1.7".into(),
            resources: vec![
                resource("m/a", load.encode_to_vec()),
                resource("m/b", b"\xff\xff".to_vec()),
                Resource { name: "m/c".into(), ..Default::default() },
                resource("m/d", Vec::new()),
            ],
            ..Default::default()
        };
        let (heard, result) = heard(&response, &XdsState::default());
        assert_eq!(heard, [("m/a".to_owned(), 3), ("m/d".to_owned(), 0)]);
        let reasons = result.unwrap_err();
        assert!(reasons[0].contains("\"m/b\"") && reasons[1].contains("\"m/c\""), "{reasons:?}");
    }

    #[test]
    fn a_deposed_leader_tells_no_news() {
        let empty = |type_url: &str| DeltaDiscoveryResponse {
            type_url: type_url.into(),
            system_version_info: "5.1".into(),
            ..Default::default()
        };
        let state = XdsState::default().apply(&empty(penstock_proto::xds::ENDPOINT_TABLE_TYPE)).unwrap();
        let response = DeltaDiscoveryResponse {
            system_version_info: "4.99".into(),
            resources: vec![resource("m/a", Vec::new())],
            ..Default::default()
        };
        let (heard, result) = heard(&response, &state);
        assert!(heard.is_empty() && result.unwrap_err()[0].contains("term 4"));
        let garbage = DeltaDiscoveryResponse { system_version_info: "x".into(), ..Default::default() };
        assert!(take(&garbage, &state, &nowhere()).is_err());
    }

    #[test]
    fn only_the_refusal_of_this_type_is_taken_for_one() {
        let refused = format!("resources of type {ENGINE_LOAD_TYPE:?} are not served here");
        assert!(is_refusal(&tonic::Status::invalid_argument(refused.clone())));
        assert!(!is_refusal(&tonic::Status::internal(refused)));
        assert!(!is_refusal(&tonic::Status::invalid_argument("node.id is empty")));
    }
}
