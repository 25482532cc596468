//! Adds the sinks of the running agent to the status report. A failing sink loses records and does not affect enforcement, so
//! that it is not a problem of the node.

use std::collections::BTreeMap;

use imds_ebpf_common::names::MAP_CONFIG;
use toml::{Table, Value};

use super::{SinkStatus, StatusReport, effective_table, unreadable};
use crate::{
    config::Otlp,
    datapath::{DatapathError, maps::config_record, object::Maps},
    escape::escape,
};

impl StatusReport {
    pub(crate) fn add_sinks(&mut self, maps: &Maps) -> Result<(), DatapathError> {
        if !self.agent.running {
            return Ok(());
        }
        let table = effective_table(maps)?;
        let names = names(&table);
        let record = config_record::read(maps).map_err(unreadable(MAP_CONFIG))?;
        let failing = record.map(|record| record.failing_sinks).unwrap_or_default();
        self.sinks.extend(names.into_iter().map(|sink| {
            let error = failing.iter().find(|(other, _)| *other == sink);
            SinkStatus {
                error: error.map(|(_, error)| escape(error).into_owned()),
                sink: escape(&sink).into_owned(),
            }
        }));
        Ok(())
    }
}

/// Returns the names of the sinks of a configuration, like the `Display` implementation of [`Sink`](crate::config::Sink).
fn names(config: &Table) -> Vec<String> {
    let sinks = config.get("events").and_then(|events| events.get("sinks")).and_then(Value::as_array);
    let mut otlp_numbers = BTreeMap::new();
    let name = |sink: &Table| {
        let text = |key: &str| sink.get(key).and_then(Value::as_str);
        let kind = text("type").unwrap_or_default();
        let target = ["path", "address"].into_iter().find_map(text).map(str::to_owned);
        let target = target.or_else(|| Some(Otlp::next_name(&mut otlp_numbers, text("url")?)));
        target.map_or_else(|| kind.to_owned(), |target| format!("{kind}:{target}"))
    };
    sinks.into_iter().flatten().filter_map(Value::as_table).map(name).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    #[test]
    fn names_are_those_of_the_agent() {
        let config = Config::parse(
            "[events]\nsinks = [{ type = 'stdout' }, { type = 'file', path = '/a' }, { type = 'syslog', address = '/dev/log' }, \
             { type = 'syslog', address = 'udp://[::1]:514' }, { type = 'otlp', url = 'http://a:4318/v1/logs' }, \
             { type = 'otlp', url = 'https://a/s3cret' }, { type = 'otlp', url = 'http://a:4318/s3cret/v1/logs' }]",
            Path::new("f"),
        )
        .unwrap();
        let table: Table = config.to_toml().parse().unwrap();
        let expected: Vec<_> = config.events.sinks.iter().map(ToString::to_string).collect();
        assert_eq!(names(&table), expected);
        assert_eq!(expected[4..], ["otlp:http://a:4318", "otlp:https://a", "otlp:http://a:4318#2"]);
    }
}
