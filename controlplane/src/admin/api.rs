//! Every route: the table of who may do what.

use axum::{
    http::Method,
    routing::{delete, get, patch, post, put},
};

use super::{
    audit, cluster, console, deployments, endpoints, node_policies, nodes, observe, openapi, placements,
    revisions, routes,
    table::{ADMIN, Content, OPEN, OPERATOR, Row, VIEWER},
    tokens,
};

/// See the module's text.
pub(super) fn rows() -> Vec<Row> {
    let (mut rows, row) = (open(), Row::new);
    rows.extend(desired());
    rows.extend(fleet());
    rows.extend([
        row(
            VIEWER,
            Method::GET,
            "/api/v2/whoami",
            "whoami",
            "Whose token this is, and what it may do.",
            get(tokens::whoami),
        )
        .gives("Whoami"),
        row(
            ADMIN,
            Method::GET,
            "/api/v2/tokens",
            "list_tokens",
            "The tokens that were made.",
            get(tokens::list),
        )
        .paged()
        .gives("TokenList"),
        row(
            ADMIN,
            Method::POST,
            "/api/v2/tokens",
            "create_token",
            "Makes a token, which is shown this once.",
            post(tokens::create),
        )
        .body("TokenBody")
        .answers(201, Content::Json("NewToken"))
        .fails(&[409]),
        row(
            ADMIN,
            Method::DELETE,
            "/api/v2/tokens/{name}",
            "delete_token",
            "Withdraws a token.",
            delete(tokens::delete),
        )
        .named()
        .edits()
        .gives("Token"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/audit",
            "list_audit",
            "What operators changed, newest first.",
            get(audit::list),
        )
        .paged()
        .query(&["model", "actor", "kind"])
        .gives("AuditList"),
        row(
            VIEWER,
            Method::GET,
            "/api/audit-logs",
            "list_audit_logs",
            "The same as /api/v2/audit.",
            get(audit::list),
        )
        .paged()
        .query(&["model", "actor", "kind"])
        .gives("AuditList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/audit/verify",
            "verify_audit",
            "Checks the chain of audit records.",
            get(audit::verify),
        )
        .query(&["number", "hash"])
        .gives("AuditVerdict"),
    ]);
    rows
}

fn open() -> Vec<Row> {
    let row = Row::new;
    vec![
        row(OPEN, Method::GET, "/", "console", "The console.", get(console::page)).sends("text/html"),
        row(OPEN, Method::GET, "/v1/admin/ui", "console_ui", "The console.", get(console::page))
            .sends("text/html"),
        row(
            OPEN,
            Method::GET,
            "/console/app.js",
            "console_script",
            "The console's script.",
            get(console::script),
        )
        .sends("text/javascript"),
        row(
            OPEN,
            Method::GET,
            "/console/style.css",
            "console_style",
            "The console's style.",
            get(console::style),
        )
        .sends("text/css"),
        row(OPEN, Method::GET, "/livez", "livez", "The process runs.", get(|| async { "ok" }))
            .sends("text/plain"),
        row(OPEN, Method::GET, "/healthz", "healthz", "The process runs.", get(|| async { "ok" }))
            .sends("text/plain"),
        row(
            OPEN,
            Method::GET,
            "/readyz",
            "readyz",
            "Whether the process should get work.",
            get(cluster::readyz),
        )
        .gives("Readiness")
        .answers(503, Content::Json("Readiness")),
        row(OPEN, Method::GET, "/metrics", "metrics", "Metrics for Prometheus.", get(cluster::metrics))
            .sends("text/plain"),
        row(OPEN, Method::GET, "/openapi.json", "openapi", "This document.", get(openapi::document))
            .sends("application/json"),
    ]
}

fn desired() -> Vec<Row> {
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

fn fleet() -> Vec<Row> {
    let row = Row::new;
    vec![
        row(
            VIEWER,
            Method::GET,
            "/api/v2/placements",
            "list_placements",
            "Where replicas have their places.",
            get(placements::list),
        )
        .paged()
        .gives("PlacementList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/placements/{*model}",
            "get_placement",
            "Where one model's replicas have theirs.",
            get(placements::get),
        )
        .named()
        .conditional()
        .gives("Placement"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/endpoints",
            "list_endpoints",
            "Every replica and its state.",
            get(endpoints::list),
        )
        .paged()
        .gives("EndpointList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/endpoints/{id}",
            "get_endpoint",
            "One replica.",
            get(endpoints::get),
        )
        .named()
        .gives("Endpoint"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/endpoints/{id}/drain",
            "drain_endpoint",
            "Sends a replica nothing new, until it is undrained.",
            post(endpoints::drain),
        )
        .named()
        .edits()
        .gives("Endpoint"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/endpoints/{id}/undrain",
            "undrain_endpoint",
            "Undoes a drain.",
            post(endpoints::undrain),
        )
        .named()
        .edits()
        .gives("Endpoint"),
        row(VIEWER, Method::GET, "/api/v2/nodes", "list_nodes", "Every node and its GPUs.", get(nodes::list))
            .paged()
            .gives("NodeList"),
        row(VIEWER, Method::GET, "/api/v2/nodes/{id}", "get_node", "One node.", get(nodes::get))
            .named()
            .conditional()
            .gives("Node"),
        row(
            OPERATOR,
            Method::PATCH,
            "/api/v2/nodes/{id}",
            "patch_node",
            "Sets a node's taints, labels and role.",
            patch(node_policies::patch),
        )
        .body("NodeBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/cordon",
            "cordon_node",
            "Gives a node no new replicas.",
            post(node_policies::cordon),
        )
        .named()
        .may_have_body("ReasonBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/maintenance",
            "maintain_node",
            "Moves a node's replicas away.",
            post(node_policies::maintenance),
        )
        .named()
        .may_have_body("ReasonBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/uncordon",
            "uncordon_node",
            "Undoes a cordon or a maintenance.",
            post(node_policies::uncordon),
        )
        .named()
        .edits()
        .gives("NodeOrName"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/proxies",
            "list_proxies",
            "The proxies that are connected here.",
            get(nodes::proxies),
        )
        .paged()
        .gives("ProxyList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/cluster/status",
            "cluster_status",
            "How this control plane stands.",
            get(cluster::status),
        )
        .gives("ClusterStatus"),
        row(
            VIEWER,
            Method::GET,
            "/v1/admin/cluster/status",
            "admin_cluster_status",
            "The same as /api/v2/cluster/status.",
            get(cluster::status),
        )
        .gives("ClusterStatus"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/logs",
            "logs",
            "This process's last lines of log.",
            get(observe::logs),
        )
        .query(&["lines"])
        .gives("Logs"),
        row(
            VIEWER,
            Method::GET,
            "/v1/admin/logs",
            "admin_logs",
            "The same as /api/v2/logs.",
            get(observe::logs),
        )
        .query(&["lines"])
        .gives("Logs"),
        row(
            VIEWER,
            Method::GET,
            "/api/observe/metrics",
            "observe_metrics",
            "This process's metrics as JSON.",
            get(observe::metrics),
        )
        .gives("MetricsSummary"),
        row(
            VIEWER,
            Method::GET,
            "/api/observe/waiting",
            "observe_waiting",
            "What waits on what, by model.",
            get(observe::waiting),
        )
        .gives("Waiting"),
        row(
            VIEWER,
            Method::GET,
            "/api/observe/router",
            "observe_router",
            "How the proxy of observe.router_url does.",
            get(observe::router),
        )
        .named()
        .gives("RouterHealth"),
    ]
}
