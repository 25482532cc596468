use std::path::Path;

use super::*;
use crate::config::Config;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("f"))
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
}

#[test]
fn sinks_of_all_types() {
    let config = parse(
        "[events]\nverdicts = ['denied']\n\
         [[events.sinks]]\ntype = 'stdout'\n\
         [[events.sinks]]\ntype = 'file'\npath = '/var/log/d.jsonl'\n\
         [[events.sinks]]\ntype = 'file'\npath = '/e'\nmax_size_mib = 1\nkeep = 2\n\
         [[events.sinks]]\ntype = 'syslog'\naddress = '/dev/log'\n\
         [[events.sinks]]\ntype = 'syslog'\naddress = 'udp://[fd00::1]:514'\n\
         [[events.sinks]]\ntype = 'syslog'\naddress = 'tcp://logs.example:601'\n\
         [[events.sinks]]\ntype = 'otlp'\nurl = 'https://otel:4318/v1/logs'\nca_file = '/ca.pem'\nheaders = { x-scope = 'a' }\n",
    )
    .unwrap();
    let Events { verdicts, sinks } = &config.events;
    assert_eq!(verdicts, &[Verdict::Denied]);
    let names: Vec<_> = sinks.iter().map(ToString::to_string).collect();
    assert_eq!(
        names,
        [
            "stdout",
            "file:/var/log/d.jsonl",
            "file:/e",
            "syslog:/dev/log",
            "syslog:udp://[fd00::1]:514",
            "syslog:tcp://logs.example:601",
            "otlp:https://otel:4318"
        ]
    );
    assert_eq!(
        &sinks[1..3],
        [
            Sink::File(LogFile { path: "/var/log/d.jsonl".into(), max_size: 64 * MIB, keep: 4 }),
            Sink::File(LogFile { path: "/e".into(), max_size: MIB, keep: 2 })
        ]
    );
    // The recorded text is the same configuration.
    assert_eq!(parse(config.to_toml()).unwrap().events, config.events);
}

#[test]
fn inline_tables_are_the_same() {
    let config = parse("[events]\nsinks = [\n  { type = 'stdout' },\n]").unwrap();
    assert_eq!(config.events, Events { verdicts: DEFAULT_VERDICTS.into(), sinks: vec![Sink::Stdout] });
    assert_eq!(parse("").unwrap().events.sinks, []);
}

#[test]
fn errors_name_line_and_key() {
    let sink = |keys: &str| format!("[[events.sinks]]\n{keys}");
    for (text, expected) in [
        (
            sink("type = 'sysolg'"),
            "f:2:8: events.sinks.type: \"sysolg\" is not one of stdout, file, syslog, otlp; did you mean \"syslog\"?",
        ),
        (sink("path = '/a'"), "f:1:1: "),
        (sink("type = 'file'"), "f:2:8: events.sinks: a sink of type \"file\" needs the key `path`"),
        (sink("type = 'file'\npath = 'a'"), "f:3:8: events.sinks.path: a is not an absolute path"),
        (sink("type = 'file'\npath = '/a/'"), "f:3:8: events.sinks.path: /a/ does not end"),
        (sink("type = 'file'\npath = '/'"), "f:3:8: events.sinks.path: / does not end"),
        (sink("type = 'file'\npath = '/a'\nkeep = 0"), "f:4:8: events.sinks.keep: 0 is not"),
        (
            sink("type = 'file'\npath = '/a'\nmax_size_mib = 70000"),
            "f:4:16: events.sinks.max_size_mib: 70000",
        ),
        (
            sink("type = 'file'\npath = '/a'\nmax_size_mb = 7"),
            "f:4:1: events.sinks.max_size_mb: unknown field",
        ),
        (
            sink("type = 'stdout'\npath = '/a'"),
            "f:3:8: events.sinks.path: a sink of type \"stdout\" has no such key",
        ),
        (sink("type = 'stdout'\nheaders = { a = 'b' }"), "f:3:13: events.sinks.headers: a sink"),
        (
            sink("type = 'syslog'\naddress = 'host:514'"),
            "f:3:11: events.sinks.address: \"host:514\" is neither",
        ),
        (sink("type = 'syslog'\naddress = 'udp://host'"), "f:3:11: events.sinks.address"),
        (sink("type = 'syslog'\naddress = 'udp://host:514/x'"), "f:3:11: events.sinks.address"),
        (sink("type = 'syslog'\naddress = 'tls://host:514'"), "f:3:11: events.sinks.address"),
        (sink("type = 'otlp'\nurl = 'otel:4318'"), "f:3:7: events.sinks.url: not a URL"),
        (sink("type = 'otlp'\nurl = 'http://a:b@c/v1/logs'"), "without user and password"),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nca_file = '/a'"),
            "f:4:11: events.sinks.ca_file: needs an https",
        ),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nheaders = { Authorization = 'x' }"),
            "f:4:13: events.sinks.headers: `config show` prints all headers; put the value of authorization into a file and \
             set header_files.authorization",
        ),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nheaders = { a = 'b' }\nheader_files = { A = '/a' }"),
            "f:5:18: events.sinks.headers: a is listed twice",
        ),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nheader_files = { a = 'b' }"),
            "f:4:22: events.sinks.header_files: b is not an absolute path",
        ),
        (
            sink("type = 'stdout'\nheader_files = { a = '/b' }"),
            "f:3:18: events.sinks.header_files: a sink of type \"stdout\" has no such key",
        ),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nheaders = { Host = 'x' }"),
            "f:4:13: events.sinks.headers: the agent sets",
        ),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nheaders = { 'a b' = 'x' }"),
            "f:4:13: events.sinks.headers: \"a b\"",
        ),
        (
            sink("type = 'otlp'\nurl = 'http://c/'\nheaders = { a = \"x\\ny\" }"),
            "f:4:17: events.sinks.headers: the value",
        ),
        (
            sink("type = 'stdout'\n[[events.sinks]]\ntype = 'stdout'"),
            "f:4:8: events.sinks: stdout is listed twice",
        ),
        (
            "[events]\nverdicts = ['deneid']".to_owned(),
            "f:2:13: events.verdicts: \"deneid\" is not one of denied, audited, allowed, exempt; did you mean \"denied\"?",
        ),
        ("[events]\nverdicts = []".to_owned(), "f:2:12: events.verdicts: the list is empty"),
        ("[events]\nsink = []".to_owned(), "did you mean \"sinks\"?"),
    ] {
        let errors = parse(&text).unwrap_err();
        assert!(errors.contains(expected), "{text}: {errors}");
    }
    let many: String = (0..9).map(|number| sink(&format!("type = 'file'\npath = '/{number}'\n"))).collect();
    assert!(parse(&many).unwrap_err().contains("events.sinks: at most 8 sinks"));
}

#[test]
fn secrets_of_otlp_are_not_printed() {
    let otlp = |keys: &str| format!("[[events.sinks]]\ntype = 'otlp'\n{keys}\n");
    for (url, expected) in [
        ("http://a/v1/logs?api-key=s3cret", "f:3:7: events.sinks.url: has a query"),
        ("http://u:s3cret@a/v1/logs", "without user and password"),
        ("ftp://a/s3cret", "f:3:7: events.sinks.url: not a URL"),
    ] {
        let errors = parse(&otlp(&format!("url = '{url}'"))).unwrap_err();
        assert!(errors.contains(expected) && !errors.contains("s3cret"), "{errors}");
    }
    for name in ["Proxy-Authorization", "cookie", "x-api-key", "X-Auth-Token"] {
        let errors =
            parse(&otlp(&format!("url = 'http://a/'\nheaders = {{ {name} = 's3cret' }}"))).unwrap_err();
        assert!(
            errors.contains("`config show` prints all headers") && !errors.contains("s3cret"),
            "{errors}"
        );
        parse(&otlp(&format!("url = 'http://a/'\nheader_files = {{ {name} = '/a' }}"))).unwrap();
    }
    for name in ["connection", "Content-Length", "transfer-encoding", "host"] {
        for keys in [format!("headers = {{ {name} = '/a' }}"), format!("header_files = {{ {name} = '/a' }}")]
        {
            let errors = parse(&otlp(&format!("url = 'http://a/'\n{keys}"))).unwrap_err();
            assert!(errors.contains("the agent sets the header"), "{errors}");
        }
    }
    let same = otlp("url = 'http://a/s3cret'").repeat(2);
    assert!(parse(&same).unwrap_err().contains("f:5:8: events.sinks: otlp:http://a#2 is listed twice"));
}
