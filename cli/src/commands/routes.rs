//! Routes: which names lead to which deployments.

use super::connect;
use crate::{
    api::{ApiError, Route, RouteSpec},
    args::{Remote, RouteCommand, RouteDeleteArgs, RouteSetArgs},
    output::{show, table},
};

pub(crate) async fn list(remote: &Remote) -> Result<(), ApiError> {
    let reply = connect(remote)?.routes().await?;
    show(remote.output, &reply.json, || route_table(&reply.value.routes))?;
    Ok(())
}

pub(crate) async fn change(command: &RouteCommand) -> Result<(), ApiError> {
    match command {
        RouteCommand::Set(args) => set(args).await,
        RouteCommand::Delete(args) => delete(args).await,
    }
}

async fn set(args: &RouteSetArgs) -> Result<(), ApiError> {
    let spec = RouteSpec { targets: args.targets.clone(), fallbacks: args.fallbacks.clone() };
    let reply = connect(&args.remote)?.set_route(&args.name, &spec).await?;
    show(args.remote.output, &reply.json, || route_table(&[reply.value]))?;
    Ok(())
}

async fn delete(args: &RouteDeleteArgs) -> Result<(), ApiError> {
    let reply = connect(&args.remote)?.delete_route(&args.name).await?;
    show(args.remote.output, &reply.json, || format!("route {} is deleted\n", reply.value.name))?;
    Ok(())
}

pub(super) fn route_table(routes: &[Route]) -> String {
    if routes.is_empty() {
        return "no routes; deploy a model, or make one with `penstock route set NAME --target MODEL`\n"
            .into();
    }
    let rows = routes.iter().map(|route| {
        let targets = route.targets.iter().map(|target| match target.weight {
            Some(weight) if route.targets.len() > 1 => format!("{}={weight}", target.model),
            _ => target.model.clone(),
        });
        [
            route.name.clone(),
            targets.collect::<Vec<_>>().join(", "),
            route.fallbacks.join(", "),
            route.missing.join(", "),
            if route.implicit { "itself".into() } else { "a route".into() },
        ]
    });
    table(["NAME", "TARGETS", "FALLBACKS", "MISSING", "BY"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::RouteTarget;

    #[test]
    fn weights_are_shown_where_there_is_something_to_weigh() {
        let target = |model: &str, weight| RouteTarget { model: model.into(), weight: Some(weight) };
        let split = Route {
            name: "chat".into(),
            targets: vec![target("a", 90), target("b", 10)],
            fallbacks: vec!["c".into()],
            missing: vec!["b".into()],
            ..Default::default()
        };
        let own =
            Route { name: "a".into(), targets: vec![target("a", 100)], implicit: true, ..Default::default() };
        let text = route_table(&[split, own]);
        assert!(text.contains("a=90, b=10") && !text.contains("a=100"), "{text}");
        assert!(route_table(&[]).contains("penstock route set"));
    }
}
