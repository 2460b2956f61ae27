//! Bookinfo: a page about a book, put together from three other services.
//!
//! Paths, JSON fields and environment variables are those of Istio's well-known example, so that its manifests, and the
//! commands that its readers type, work; the texts are our own.

use std::{cell::RefCell, collections::BTreeMap, env, ffi::OsString, rc::Rc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, StatusCode};
use serde_json::{Value, json};

use super::http::{Incoming, Peer, Reply, json as json_reply, listen, serve, text, with_type};

pub(super) async fn main(args: Vec<OsString>) -> Result<(), String> {
    let args: Vec<String> = args
        .iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let service = args.get(1).map(String::as_str).unwrap_or_default();
    let port = match args.get(2) {
        None => 9080,
        Some(text) => text
            .parse()
            .map_err(|_| format!("outrigger bookinfo: {text:?} is not a port"))?,
    };
    let state = Rc::new(Settings::from_env());
    let stored = Rc::new(RefCell::new(BTreeMap::new()));
    let listener = listen(port).await?;
    println!("{service} {} listens on port {port}", state.version);
    match service {
        "productpage" => serve(listener, move |r| productpage(state.clone(), r)).await,
        "details" => serve(listener, move |r| std::future::ready(details(&r))).await,
        "reviews" => serve(listener, move |r| reviews(state.clone(), r)).await,
        "ratings" => serve(listener, move |r| ratings(state.clone(), stored.clone(), r)).await,
        other => {
            return Err(format!("outrigger bookinfo: no service {other:?}; there are productpage, details, reviews and ratings"));
        }
    }
    .map_err(|e| format!("{service}: {e}"))
}

/// What the environment says, as in the original's images.
#[derive(Debug)]
struct Settings {
    version: String,
    pod: String,
    details: Peer,
    reviews: Peer,
    ratings: Peer,
    ratings_enabled: bool,
    star_color: String,
    /// How long the others are waited for, instead of the original's limits (`SERVICES_TIMEOUT`, seconds).
    patience: Option<Duration>,
}

impl Settings {
    fn from_env() -> Self {
        let var = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        let domain = var("SERVICES_DOMAIN")
            .map(|d| format!(".{d}"))
            .unwrap_or_default();
        let service = |name: &str| {
            let upper = name.to_ascii_uppercase();
            let host = var(&format!("{upper}_HOSTNAME")).unwrap_or_else(|| name.to_owned());
            let port = var(&format!("{upper}_SERVICE_PORT"))
                .and_then(|p| p.parse().ok())
                .unwrap_or(9080);
            Peer::new(format!("{host}{domain}"), port)
        };
        Self {
            version: var("SERVICE_VERSION").unwrap_or_else(|| "v1".to_owned()),
            pod: var("HOSTNAME").unwrap_or_default(),
            details: service("details"),
            reviews: service("reviews"),
            ratings: service("ratings"),
            ratings_enabled: var("ENABLE_RATINGS").is_some_and(|v| v == "true"),
            star_color: var("STAR_COLOR").unwrap_or_else(|| "black".to_owned()),
            patience: var("SERVICES_TIMEOUT")
                .and_then(|seconds| seconds.parse().ok())
                .map(Duration::from_secs),
        }
    }
}

/// What a service passes on from the request that it serves to those that it makes: the seven headers of tracing, those
/// of newer tracers, and what routing and authentication may look at.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    FORWARDED
        .iter()
        .map(|name| HeaderName::from_static(name))
        .filter_map(|name| headers.get(&name).map(|value| (name, value.clone())))
        .collect()
}

const FORWARDED: &[&str] = &[
    "x-request-id",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "x-ot-span-context",
    "b3",
    "traceparent",
    "tracestate",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "x-cloud-trace-context",
    "grpc-trace-bin",
    "sw8",
    "end-user",
    "user-agent",
    "cookie",
    "authorization",
    "jwt",
];

async fn productpage(settings: Rc<Settings>, incoming: Incoming) -> Reply {
    let request = &incoming.request;
    let [details_limit, reviews_limit] =
        [DETAILS_LIMIT, REVIEWS_LIMIT].map(|limit| settings.patience.unwrap_or(limit));
    let mut headers = forwarded(request.headers());
    if let Some(user) = session_user(request.headers()).and_then(|u| u.parse().ok()) {
        headers.insert("end-user", user);
    }
    let path = request.uri().path();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match (request.method(), parts.as_slice()) {
        (&Method::GET, [""] | ["index.html"]) => html(&index_page()),
        (&Method::GET, ["health"]) => text(StatusCode::OK, "Product page is healthy".to_owned()),
        (&Method::GET, ["productpage"]) => {
            let (details, reviews) = tokio::join!(
                fetch(&settings.details, "/details/0", &headers, details_limit, 1),
                fetch(&settings.reviews, "/reviews/0", &headers, reviews_limit, 2),
            );
            html(&product_page(
                session_user(request.headers()).as_deref(),
                &details,
                &reviews,
            ))
        }
        (&Method::POST, ["login"]) => {
            let user = form_value(request.body(), "username").unwrap_or_default();
            redirect_with_user(&user)
        }
        (&Method::GET, ["logout"]) => redirect_with_user(""),
        (&Method::GET, ["api", "v1", "products"]) => json_reply(StatusCode::OK, &products()),
        (&Method::GET, ["api", "v1", "products", id]) if product(id) => relay(
            fetch(
                &settings.details,
                &format!("/details/{id}"),
                &headers,
                details_limit,
                1,
            )
            .await,
            "product details",
        ),
        (&Method::GET, ["api", "v1", "products", id, "reviews"]) if product(id) => relay(
            fetch(
                &settings.reviews,
                &format!("/reviews/{id}"),
                &headers,
                reviews_limit,
                2,
            )
            .await,
            "product reviews",
        ),
        (&Method::GET, ["api", "v1", "products", id, "ratings"]) if product(id) => relay(
            fetch(
                &settings.ratings,
                &format!("/ratings/{id}"),
                &headers,
                details_limit,
                1,
            )
            .await,
            "product ratings",
        ),
        _ => text(StatusCode::NOT_FOUND, "there is no such page\n".to_owned()),
    }
}

fn product(id: &str) -> bool {
    id.parse::<u64>().is_ok()
}

/// Asks a service for JSON, again where that fails; the error is the status to show.
async fn fetch(
    service: &Peer,
    path: &str,
    headers: &HeaderMap,
    limit: Duration,
    attempts: u32,
) -> Result<Value, StatusCode> {
    let mut failure = StatusCode::INTERNAL_SERVER_ERROR;
    for _ in 0..attempts {
        match service.get(path, headers, limit).await {
            Ok((StatusCode::OK, body)) => match serde_json::from_slice(&body) {
                Ok(value) => return Ok(value),
                Err(e) => println!("{}{path}: the answer is not JSON: {e}", service.host),
            },
            Ok((status, _)) => failure = status,
            Err(e) => println!("{}{path}: {e}", service.host),
        }
    }
    Err(failure)
}

fn relay(result: Result<Value, StatusCode>, what: &str) -> Reply {
    match result {
        Ok(value) => json_reply(StatusCode::OK, &value),
        Err(status) => json_reply(status, &json!({"error": unavailable(what)})),
    }
}

fn unavailable(what: &str) -> String {
    format!("Sorry, {what} are currently unavailable for this book.")
}

fn products() -> Value {
    json!([{
        "id": 0,
        "title": "The Comedy of Errors",
        "descriptionHtml": "An early play by <b>William Shakespeare</b>: two pairs of twins, one day in Ephesus, and \
            everybody taken for somebody else.",
    }])
}

fn html(body: &str) -> Reply {
    with_type(StatusCode::OK, "text/html; charset=utf-8", body.to_owned())
}

fn page(body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html>\n<head>\n<meta charset=\"utf-8\">\n<title>Simple Bookstore App</title>\n<style>\
         body{{font-family:sans-serif;margin:2em auto;max-width:60em}}.red{{color:red}}.black{{color:black}}\
         section{{margin:1em 0;padding:1em;border:1px solid #ccc}}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
}

fn index_page() -> String {
    page(
        "<h1>BookInfo</h1>\n<p><a href=\"/productpage?u=normal\">Normal user</a></p>\n<p><a href=\"/productpage?u=test\">Test user</a></p>",
    )
}

fn product_page(
    user: Option<&str>,
    details: &Result<Value, StatusCode>,
    reviews: &Result<Value, StatusCode>,
) -> String {
    let mut body = String::from("<h1>The Comedy of Errors</h1>\n");
    match user {
        Some(user) => body.push_str(&format!("<p>{} (<a href=\"/logout\">sign out</a>)</p>\n", escape(user))),
        None => body.push_str(
            "<form method=\"post\" action=\"login\"><input name=\"username\" placeholder=\"User Name\"> \
             <button>Sign in</button></form>\n",
        ),
    }
    body.push_str(&format!(
        "<p>{}</p>\n",
        products()[0]["descriptionHtml"].as_str().unwrap_or("")
    ));
    body.push_str("<section>\n<h4>Book Details</h4>\n");
    match details {
        Ok(d) => {
            body.push_str("<dl>\n");
            for (label, field) in [
                ("Type", "type"),
                ("Pages", "pages"),
                ("Publisher", "publisher"),
                ("Language", "language"),
                ("ISBN-10", "ISBN-10"),
                ("ISBN-13", "ISBN-13"),
            ] {
                body.push_str(&format!("<dt>{label}:</dt>{}\n", escape(&plain(&d[field]))));
            }
            body.push_str("</dl>\n");
        }
        Err(_) => body.push_str(&format!(
            "<h4>Error fetching product details!</h4>\n<p>{}</p>\n",
            unavailable("product details")
        )),
    }
    body.push_str("</section>\n<section>\n<h4>Book Reviews</h4>\n");
    match reviews {
        Ok(r) => {
            for review in r["reviews"].as_array().into_iter().flatten() {
                body.push_str(&format!(
                    "<blockquote>\n<p>{}</p>\n<small>{}</small>\n",
                    escape(&plain(&review["text"])),
                    escape(&plain(&review["reviewer"])),
                ));
                let rating = &review["rating"];
                if let Some(stars) = rating["stars"].as_u64() {
                    let color = escape(rating["color"].as_str().unwrap_or("black"));
                    let star = format!(
                        "<span class=\"glyphicon glyphicon-star {color}\">&#9733;</span>\n"
                    );
                    body.push_str(&format!(
                        "<font color=\"{color}\">\n{}</font>\n",
                        star.repeat(stars.min(5) as usize)
                    ));
                } else if let Some(error) = rating["error"].as_str() {
                    body.push_str(&format!("<p><i>{}</i></p>\n", escape(error)));
                }
                body.push_str("</blockquote>\n");
            }
            body.push_str(&format!(
                "<dl>\n<dt>Reviews served by:</dt>\n<u>{}</u>\n</dl>\n",
                escape(&plain(&r["podname"]))
            ));
        }
        Err(_) => body.push_str(&format!(
            "<h4>Error fetching product reviews!</h4>\n<p>{}</p>\n",
            unavailable("product reviews")
        )),
    }
    body.push_str("</section>");
    page(&body)
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The user of the session cookie. It is not signed: this is a page about a book.
fn session_user(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get_all("cookie");
    let mut pairs = cookies
        .iter()
        .filter_map(|c| c.to_str().ok())
        .flat_map(|c| c.split(';'));
    pairs
        .find_map(|p| p.trim().strip_prefix("session=").map(str::to_owned))
        .filter(|u| !u.is_empty())
}

fn form_value(body: &Bytes, name: &str) -> Option<String> {
    let body = String::from_utf8_lossy(body);
    let value = body
        .split('&')
        .find_map(|p| p.strip_prefix(name)?.strip_prefix('='))?;
    // Letters and digits only: enough for a name, and nothing that could break out of a header.
    Some(
        value
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            .collect(),
    )
}

fn redirect_with_user(user: &str) -> Reply {
    let mut reply = text(StatusCode::FOUND, String::new());
    let expiry = if user.is_empty() { "; Max-Age=0" } else { "" };
    for (name, value) in [
        ("location", "/productpage".to_owned()),
        (
            "set-cookie",
            format!("session={user}; Path=/; HttpOnly{expiry}"),
        ),
    ] {
        if let Ok(value) = value.parse() {
            reply
                .headers_mut()
                .insert(HeaderName::from_static(name), value);
        }
    }
    reply
}

fn details(incoming: &Incoming) -> Reply {
    let parts: Vec<&str> = incoming
        .request
        .uri()
        .path()
        .trim_matches('/')
        .split('/')
        .collect();
    match parts.as_slice() {
        ["health"] => json_reply(StatusCode::OK, &json!({"status": "Details is healthy"})),
        ["details", id] => match id.parse::<u64>() {
            Ok(id) => json_reply(
                StatusCode::OK,
                &json!({
                    "id": id, "author": "William Shakespeare", "year": 1595, "type": "paperback", "pages": 200,
                    "publisher": "PublisherA", "language": "English", "ISBN-10": "1234567890", "ISBN-13": "123-1234567890",
                }),
            ),
            Err(_) => json_reply(
                StatusCode::BAD_REQUEST,
                &json!({"error": "please provide numeric product id"}),
            ),
        },
        _ => text(StatusCode::NOT_FOUND, "Not Found\n".to_owned()),
    }
}

async fn reviews(settings: Rc<Settings>, incoming: Incoming) -> Reply {
    let parts: Vec<&str> = incoming
        .request
        .uri()
        .path()
        .trim_matches('/')
        .split('/')
        .collect();
    let id = match parts.as_slice() {
        ["health"] => return json_reply(StatusCode::OK, &json!({"status": "Reviews is healthy"})),
        ["reviews", id] => *id,
        _ => return text(StatusCode::NOT_FOUND, "Not Found\n".to_owned()),
    };
    let mut stars = Value::Null;
    if settings.ratings_enabled {
        let headers = forwarded(incoming.request.headers());
        // The version with black stars is patient, the one with red stars is not: what fault examples build on.
        let limit = Duration::from_millis(if settings.star_color == "black" {
            10_000
        } else {
            2_500
        });
        let limit = settings.patience.unwrap_or(limit);
        if let Ok(found) = fetch(
            &settings.ratings,
            &format!("/ratings/{id}"),
            &headers,
            limit,
            1,
        )
        .await
        {
            stars = found["ratings"].clone();
        }
    }
    let review = |reviewer: &str, text: &str| {
        let mut review = json!({"reviewer": reviewer, "text": text});
        if settings.ratings_enabled {
            review["rating"] = match stars[reviewer].as_i64() {
                Some(stars) => json!({"stars": stars, "color": settings.star_color}),
                None => json!({"error": "Ratings service is currently unavailable"}),
            };
        }
        review
    };
    json_reply(
        StatusCode::OK,
        &json!({
            "id": id,
            "podname": settings.pod,
            "clustername": env::var("CLUSTER_NAME").unwrap_or_else(|_| "null".to_owned()),
            "reviews": [
                review("Reviewer1", "Quick, loud and very funny. One should see it on a stage, in the open, with a crowd."),
                review("Reviewer2", "Light fare, well made. Whoever looks for depth is in the wrong play by the right author."),
            ],
        }),
    )
}

async fn ratings(
    settings: Rc<Settings>,
    stored: Rc<RefCell<BTreeMap<u64, Value>>>,
    incoming: Incoming,
) -> Reply {
    let request = &incoming.request;
    let parts: Vec<&str> = request.uri().path().trim_matches('/').split('/').collect();
    let id = match parts.as_slice() {
        ["health"] => return json_reply(StatusCode::OK, &json!({"status": "Ratings is healthy"})),
        ["ratings", id] => match id.parse::<u64>() {
            Ok(id) => id,
            Err(_) => {
                return json_reply(
                    StatusCode::BAD_REQUEST,
                    &json!({"error": "please provide numeric product ID"}),
                );
            }
        },
        _ => return text(StatusCode::NOT_FOUND, "Not Found\n".to_owned()),
    };
    // The original's versions for trying out faults.
    match settings.version.as_str() {
        "v-unavailable" => {
            return json_reply(
                StatusCode::SERVICE_UNAVAILABLE,
                &json!({"error": "Service unavailable"}),
            );
        }
        "v-delayed" => tokio::time::sleep(Duration::from_secs(7)).await,
        _ => {}
    }
    if request.method() == Method::POST {
        return match serde_json::from_slice::<BTreeMap<String, i64>>(request.body()) {
            Ok(given) => {
                let value = json!(given);
                stored.borrow_mut().insert(id, value.clone());
                json_reply(StatusCode::OK, &json!({"id": id, "ratings": value}))
            }
            Err(_) => json_reply(
                StatusCode::BAD_REQUEST,
                &json!({"error": "please provide valid ratings JSON"}),
            ),
        };
    }
    let found = stored
        .borrow()
        .get(&id)
        .cloned()
        .unwrap_or_else(|| json!({"Reviewer1": 5, "Reviewer2": 4}));
    json_reply(StatusCode::OK, &json!({"id": id, "ratings": found}))
}

const DETAILS_LIMIT: Duration = Duration::from_secs(3);
const REVIEWS_LIMIT: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracing_headers_and_the_user_travel_on() {
        let mut headers = HeaderMap::new();
        for name in [
            "x-request-id",
            "x-b3-traceid",
            "x-b3-spanid",
            "x-b3-parentspanid",
            "x-b3-sampled",
            "x-b3-flags",
            "x-ot-span-context",
            "end-user",
        ] {
            headers.insert(HeaderName::from_static(name), name.parse().unwrap());
        }
        headers.insert("x-other", "no".parse().unwrap());
        let out = forwarded(&headers);
        assert_eq!(out.len(), 8);
        assert!(!out.contains_key("x-other"));
    }

    #[test]
    fn the_page_shows_stars_or_says_why_not() {
        let review = json!({"podname": "reviews-v3", "reviews": [{"reviewer": "R", "text": "<b>", "rating": {"stars": 4, "color": "red"}}]});
        let page = product_page(
            Some("jason"),
            &Ok(json!({"type": "paperback", "pages": 200})),
            &Ok(review),
        );
        assert!(page.contains("<title>Simple Bookstore App</title>"));
        assert_eq!(page.matches("glyphicon-star red").count(), 4);
        assert!(
            page.contains("&lt;b&gt;") && page.contains("reviews-v3") && page.contains("jason")
        );
        let page = product_page(
            None,
            &Err(StatusCode::BAD_GATEWAY),
            &Err(StatusCode::BAD_GATEWAY),
        );
        assert!(
            page.contains("Error fetching product reviews!")
                && page.contains("Error fetching product details!")
        );
    }

    #[test]
    fn a_session_cannot_break_out_of_its_header() {
        assert_eq!(
            form_value(&Bytes::from("username=ja%0d%0ason&x=1"), "username").as_deref(),
            Some("ja0d0ason")
        );
        let mut headers = HeaderMap::new();
        headers.insert("cookie", "a=b; session=jason".parse().unwrap());
        assert_eq!(session_user(&headers).as_deref(), Some("jason"));
    }
}
