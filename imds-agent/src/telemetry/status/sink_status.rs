//! Adds the sinks of the running agent to the status report. A failing sink loses records and does not affect enforcement, so
//! that it is not a problem of the node.

use imds_ebpf_common::names::MAP_CONFIG;
use toml::{Table, Value};

use super::{SinkStatus, StatusReport, effective_table, unreadable};
use crate::{
    datapath::{DatapathError, maps::config_record, object::Maps},
    escape::escape,
};

impl StatusReport {
    pub(crate) fn add_sinks(&mut self, maps: &Maps) -> Result<(), DatapathError> {
        if !self.agent.running {
            return Ok(());
        }
        let table = effective_table(maps)?;
        let sinks = table.get("events").and_then(|events| events.get("sinks")).and_then(Value::as_array);
        let names: Vec<_> = sinks.into_iter().flatten().filter_map(Value::as_table).map(name).collect();
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

/// Returns the type and the target of a sink, like the `Display` implementation of [`Sink`](crate::config::Sink).
fn name(sink: &Table) -> String {
    let text = |key: &str| sink.get(key).and_then(Value::as_str);
    let kind = text("type").unwrap_or_default();
    let target = ["path", "address", "url"].into_iter().find_map(text);
    target.map_or_else(|| kind.to_owned(), |target| format!("{kind}:{target}"))
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
             { type = 'syslog', address = 'udp://[::1]:514' }, { type = 'otlp', url = 'http://a:4318/v1/logs' }]",
            Path::new("f"),
        )
        .unwrap();
        let table: Table = config.to_toml().parse().unwrap();
        let found = table["events"]["sinks"].as_array().unwrap().iter();
        let names: Vec<_> = found.map(|sink| name(sink.as_table().unwrap())).collect();
        let expected: Vec<_> = config.events.sinks.iter().map(ToString::to_string).collect();
        assert_eq!(names, expected);
    }
}
