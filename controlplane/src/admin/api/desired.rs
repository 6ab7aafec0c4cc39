//! Routes of what shall run.

use axum::{
    http::Method,
    routing::{delete, get, patch, post, put},
};

use super::super::{
    deployments, revisions, routes,
    table::{Content, OPERATOR, Row, VIEWER},
};

pub(super) fn rows() -> Vec<Row> {
    let row = Row::new;
    vec![
        row(
            VIEWER,
            Method::GET,
            "/api/v2/deployments",
            "list_deployments",
            "What shall run, and how far it is.",
            get(deployments::list),
        )
        .paged()
        .gives("DeploymentList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/deployments/{*model}",
            "get_deployment",
            "One deployment.",
            get(deployments::get),
        )
        .named()
        .conditional()
        .gives("Deployment"),
        row(
            OPERATOR,
            Method::PUT,
            "/api/v2/deployments/{*model}",
            "put_deployment",
            "Makes a deployment, or replaces what it shall be.",
            put(deployments::put),
        )
        .body("DeploymentBody")
        .edits()
        .gives("Deployment")
        .answers(201, Content::Json("Deployment")),
        row(
            OPERATOR,
            Method::PATCH,
            "/api/v2/deployments/{*model}",
            "patch_deployment",
            "Scales a deployment, or pauses its rollout.",
            patch(deployments::patch),
        )
        .named()
        .body("DeploymentPatch")
        .edits()
        .gives("Deployment"),
        row(
            OPERATOR,
            Method::DELETE,
            "/api/v2/deployments/{*model}",
            "delete_deployment",
            "Ends a deployment: its engines drain and stop.",
            delete(deployments::delete),
        )
        .named()
        .edits()
        .gives("Deployment"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/models",
            "list_models",
            "The models, in short.",
            get(deployments::models),
        )
        .paged()
        .gives("ModelList"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/wake/{*model}",
            "wake_model",
            "Says that somebody waits for a model that sleeps.",
            post(deployments::wake),
        )
        .named()
        .may_have_body("WakeBody")
        .answers(202, Content::Json("Wake")),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/revisions/{*model}",
            "list_revisions",
            "What a deployment was, newest first.",
            get(revisions::list),
        )
        .named()
        .gives("RevisionList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/diff/{*model}",
            "diff_revisions",
            "What differs between two revisions.",
            get(revisions::diff),
        )
        .named()
        .query(&["from", "to"])
        .gives("RevisionDiff"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/rollback/{*model}",
            "rollback",
            "Makes a deployment what it was.",
            post(revisions::rollback),
        )
        .named()
        .may_have_body("RollbackBody")
        .edits()
        .gives("Deployment"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/routes",
            "list_routes",
            "Which names lead where.",
            get(routes::list),
        )
        .paged()
        .gives("RouteList"),
        row(VIEWER, Method::GET, "/api/v2/routes/{*name}", "get_route", "One route.", get(routes::get))
            .named()
            .conditional()
            .gives("Route"),
        row(
            OPERATOR,
            Method::PUT,
            "/api/v2/routes/{*name}",
            "put_route",
            "Makes a route, or replaces where it leads.",
            put(routes::put),
        )
        .body("RouteBody")
        .edits()
        .gives("Route")
        .answers(201, Content::Json("Route")),
        row(
            OPERATOR,
            Method::DELETE,
            "/api/v2/routes/{*name}",
            "delete_route",
            "Takes a route away.",
            delete(routes::delete),
        )
        .named()
        .edits()
        .gives("Route"),
    ]
}
