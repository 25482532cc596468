//! Metric families: names, help texts and samples, independent of the text format.

use std::fmt;

/// All time series with the same metric name.
#[derive(Clone, Debug)]
pub(crate) struct Family {
    /// Name of the metric, without the suffix `_total` of counters.
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) kind: MetricKind,
    pub(crate) samples: Vec<Sample>,
}

/// Metric type of a family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MetricKind {
    Counter,
    Gauge,
}

/// One time series: labels and value.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) labels: Vec<(&'static str, String)>,
    pub(crate) value: Number,
}

/// Value of a sample: integers are printed without a decimal point.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Number {
    Integer(u64),
    Float(f64),
}

impl MetricKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
        }
    }
}

impl From<u64> for Number {
    fn from(value: u64) -> Self {
        Self::Integer(value)
    }
}

impl From<bool> for Number {
    fn from(value: bool) -> Self {
        Self::Integer(value.into())
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

/// Collects the families of one scrape.
#[derive(Debug, Default)]
pub(crate) struct Families(Vec<Family>);

impl Families {
    pub(crate) fn counter<const N: usize, V: Into<Number>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = ([(&'static str, String); N], V)>,
    ) {
        self.add(MetricKind::Counter, name, help, samples);
    }

    pub(crate) fn gauge<const N: usize, V: Into<Number>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = ([(&'static str, String); N], V)>,
    ) {
        self.add(MetricKind::Gauge, name, help, samples);
    }

    /// Adds a family, unless it has no sample.
    fn add<const N: usize, V: Into<Number>>(
        &mut self,
        kind: MetricKind,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = ([(&'static str, String); N], V)>,
    ) {
        let sample = |(labels, value): ([_; N], V)| Sample { labels: labels.into(), value: value.into() };
        let samples: Vec<_> = samples.into_iter().map(sample).collect();
        if !samples.is_empty() {
            self.0.push(Family { name, help, kind, samples });
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Family> {
        self.0.iter()
    }
}
