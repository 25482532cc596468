//! Servers that decode, normalise or lower-case the path of a request before they choose a handler.

/// Path that the rules of the tests allow.
pub const LOCATION: &str = "/metadata/instance/compute/location";

/// Parts of targets: paths of the service.
pub const PATHS: [&str; 8] = [
    LOCATION,
    "/metadata/instance/compute",
    "/metadata/instance/compute/userData",
    "/metadata/identity/oauth2/token",
    "/location",
    "/token",
    "/metadata",
    "x",
];
/// Parts of targets that servers treat specially.
pub const SEPARATORS: [&str; 32] = [
    "/",
    "//",
    "/.",
    "/..",
    "/../",
    "/.;/",
    "/..;/",
    "/%2e%2e/",
    "/%2E.",
    "/.%2e/",
    "%2f",
    "%2F",
    "%5c",
    "%252e%252e%252f",
    "%00",
    "%0d%0a",
    "%",
    "%c0%ae",
    "\\",
    "/..\\",
    ";a=b",
    "/;/",
    "\0",
    "\u{ff0e}\u{ff0e}\u{ff0f}",
    "\u{2215}",
    "\u{2024}",
    "http://169.254.169.254",
    "@169.254.169.254",
    ":80",
    "/%2f",
    "/.%00",
    "/%2e",
];
/// Parts of targets at and after the end of the path.
pub const QUERIES: [&str; 9] = [
    "?",
    "#",
    "?api-version=1",
    "&format=text",
    "?a=/../../identity/oauth2/token",
    "&api-version=1",
    "?comp=x",
    " ",
    "\t",
];

/// Step in which a server changes a target before it routes the request.
pub type Step = fn(&str) -> String;

/// Servers: the simplest one, one for each step, and one with all steps.
pub const SERVERS: [&[Step]; 9] = [
    &[],
    &[percent_decode],
    &[percent_decode, percent_decode],
    &[normalise],
    &[percent_decode, normalise],
    &[drop_parameters, normalise],
    &[truncate_at_nul, normalise],
    &[to_ascii, lower_case],
    &[percent_decode, percent_decode, to_ascii, truncate_at_nul, drop_parameters, normalise, lower_case],
];

/// Returns the path of the handler that a server chooses.
#[must_use]
pub fn route(server: &[Step], target: &str) -> String {
    let without_host = target.strip_prefix("http://").and_then(|rest| rest.find('/').map(|at| &rest[at..]));
    let target = without_host.unwrap_or(target);
    let path = target.split(['?', '#']).next().unwrap_or_default();
    server.iter().fold(path.to_owned(), |path, step| step(&path))
}

fn percent_decode(path: &str) -> String {
    let (mut decoded, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        let digits =
            after.get(..2).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        rest = after;
        match digits {
            Some(value) if byte == b'%' => {
                decoded.push(value);
                rest = &after[2..];
            }
            _ => decoded.push(byte),
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn normalise(path: &str) -> String {
    let mut segments = Vec::new();
    for segment in path.replace('\\', "/").split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment.to_owned()),
        }
    }
    format!("/{}", segments.join("/"))
}

fn drop_parameters(path: &str) -> String {
    let segments: Vec<_> =
        path.split('/').map(|segment| segment.split(';').next().unwrap_or_default()).collect();
    segments.join("/")
}

fn truncate_at_nul(path: &str) -> String {
    path.split('\0').next().unwrap_or_default().to_owned()
}

/// Replaces fullwidth forms and other slashes.
fn to_ascii(path: &str) -> String {
    let replace = |c: char| match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        '\u{2044}' | '\u{2215}' | '\u{29f8}' => '/',
        '\u{2024}' => '.',
        _ => c,
    };
    path.chars().map(replace).collect()
}

fn lower_case(path: &str) -> String {
    path.to_lowercase()
}

/// Reports whether a rule allows the handler, however the server writes its path.
fn is_allowed_handler(handler: &str) -> bool {
    let (handler, location) = (handler.to_lowercase(), LOCATION.to_lowercase());
    handler.strip_prefix(&location).is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

/// Asserts that all servers route a target to a handler at or below [`LOCATION`].
#[track_caller]
pub fn assert_routes_are_allowed(target: &str) {
    for (number, server) in SERVERS.iter().enumerate() {
        let handler = route(server, target);
        assert!(is_allowed_handler(&handler), "server {number} routes {target:?} to {handler}");
    }
}
