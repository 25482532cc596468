//! The effect of a rule or TC action on one bit of the packet mark.

use serde_json::Value;
use strum::IntoStaticStr;

use super::rulesets::Body;

/// The state of the bit after a rule, as far as the rule alone tells.
#[derive(Clone, Copy, Debug, Eq, IntoStaticStr, PartialEq)]
#[strum(serialize_all = "lowercase")]
pub(crate) enum Effect {
    Unchanged,
    Set,
    Cleared,
    /// The bit depends on something else than its own state before.
    Changed,
}

impl Effect {
    pub(crate) const fn verb(self) -> &'static str {
        match self {
            Self::Unchanged => "keeps",
            Self::Set => "sets",
            Self::Cleared => "clears",
            Self::Changed => "can change",
        }
    }

    const fn from_bit(value: u32, bit: u32) -> Self {
        if value & bit == 0 { Self::Cleared } else { Self::Set }
    }

    const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Cleared, _) | (_, Self::Cleared) => Self::Cleared,
            (Self::Set, same) | (same, Self::Set) => same,
            (Self::Unchanged, Self::Unchanged) => Self::Unchanged,
            _ => Self::Changed,
        }
    }

    const fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Set, _) | (_, Self::Set) => Self::Set,
            (Self::Cleared, same) | (same, Self::Cleared) => same,
            (Self::Unchanged, Self::Unchanged) => Self::Unchanged,
            _ => Self::Changed,
        }
    }

    const fn xor(self, other: Self) -> Self {
        match (self, other) {
            (Self::Cleared, same) | (same, Self::Cleared) => same,
            (Self::Set, Self::Set) | (Self::Unchanged, Self::Unchanged) => Self::Cleared,
            _ => Self::Changed,
        }
    }

    const fn then(self, next: Self) -> Self {
        match next {
            Self::Unchanged => self,
            next => next,
        }
    }
}

pub(crate) fn rule_effect(body: &Body, bit: u32) -> Effect {
    match body {
        Body::Iptables(words) => iptables_effect(words, bit),
        Body::Nft(expressions) => {
            let effects = expressions.iter().map(|expression| expression_effect(expression, bit));
            effects.fold(Effect::Unchanged, Effect::then)
        }
    }
}

/// Returns the value and the mask that an option stands for, from those in its text.
type MarkChange = fn(u32, u32) -> (u32, u32);

/// Reads the target of a rule of `iptables-save`: MARK, CONNMARK, TPROXY and SET can write the mark.
fn iptables_effect(words: &[String], bit: u32) -> Effect {
    let value = |name: &str| {
        let position = words.iter().position(|word| word == name)?;
        words.get(position + 1).map(String::as_str)
    };
    let has = |name: &str| words.iter().any(|word| word == name);
    let change = |text: &str, to: MarkChange| {
        let Some((value, mask)) = value_and_mask(text) else { return Effect::Changed };
        let (value, mask) = to(value, mask);
        masked(value, mask, bit)
    };
    match value("-j").unwrap_or_default() {
        "MARK" => {
            let options: [(&str, MarkChange); 5] = [
                ("--set-xmark", |value, mask| (value, mask)),
                ("--set-mark", |value, mask| (value, value | mask)),
                ("--or-mark", |bits, _| (bits, bits)),
                ("--and-mark", |bits, _| (0, !bits)),
                ("--xor-mark", |bits, _| (bits, 0)),
            ];
            let option = options.into_iter().find_map(|(name, to)| Some((value(name)?, to)));
            option.map_or(Effect::Changed, |(text, to)| change(text, to))
        }
        "CONNMARK" if has("--restore-mark") => {
            if has("--left-shift") || has("--right-shift") {
                return Effect::Changed;
            }
            let mask = |name| value(name).or(value("--mask")).map_or(Some(u32::MAX), parse);
            let (Some(of_packet), Some(of_connection)) = (mask("--nfmask"), mask("--ctmask")) else {
                return Effect::Changed;
            };
            // mark = (mark & ~nfmask) ^ (connection's mark & ctmask): xt_connmark.c.
            let unchanged_bit = Effect::Unchanged.and(Effect::from_bit(!of_packet, bit));
            unchanged_bit.xor(Effect::Changed.and(Effect::from_bit(of_connection, bit)))
        }
        "TPROXY" => {
            value("--tproxy-mark").map_or(Effect::Unchanged, |text| change(text, |value, mask| (value, mask)))
        }
        "SET" if has("--map-mark") => Effect::Changed,
        _ => Effect::Unchanged,
    }
}

/// Returns the effect of `mark = (mark & ~mask) ^ value`.
fn masked(value: u32, mask: u32, bit: u32) -> Effect {
    Effect::Unchanged.and(Effect::from_bit(!mask, bit)).xor(Effect::from_bit(value, bit))
}

fn value_and_mask(text: &str) -> Option<(u32, u32)> {
    match text.split_once('/') {
        Some((value, mask)) => Some((parse(value)?, parse(mask)?)),
        None => Some((parse(text)?, u32::MAX)),
    }
}

fn parse(number: &str) -> Option<u32> {
    match number.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => number.parse().ok(),
    }
}

/// Reads an expression of nftables: a statement that writes the mark, or a target of iptables that nft can't describe.
fn expression_effect(expression: &Value, bit: u32) -> Effect {
    if let Some(statement) = expression.get("mangle")
        && is_packet_mark(&statement["key"])
    {
        return operand_effect(&statement["value"], bit);
    }
    let target = &expression["xt"];
    let is_mark_target =
        target["type"] == "target" && (target["name"] == "MARK" || target["name"] == "CONNMARK");
    if is_mark_target { Effect::Changed } else { Effect::Unchanged }
}

fn is_packet_mark(expression: &Value) -> bool {
    expression.pointer("/meta/key").and_then(Value::as_str) == Some("mark")
}

/// Returns the bit of a value in nftables. Only constants, the mark and their combinations are known.
fn operand_effect(operand: &Value, bit: u32) -> Effect {
    if is_packet_mark(operand) {
        return Effect::Unchanged;
    }
    if let Some(value) = operand.as_u64() {
        return u32::try_from(value).map_or(Effect::Changed, |value| Effect::from_bit(value, bit));
    }
    let operands = |operator: &str| {
        let operands = operand.get(operator)?.as_array()?;
        Some(operands.iter().map(|operand| operand_effect(operand, bit)).collect::<Vec<_>>().into_iter())
    };
    let combined = if let Some(effects) = operands("&") {
        effects.reduce(Effect::and)
    } else if let Some(effects) = operands("|") {
        effects.reduce(Effect::or)
    } else {
        operands("^").and_then(|effects| effects.reduce(Effect::xor))
    };
    combined.unwrap_or(Effect::Changed)
}

/// Returns the effect of a TC action: `skbedit` writes a value under a mask, `connmark` the connection's mark.
pub(crate) fn action_effect(action: &Value, bit: u32) -> Effect {
    let number = |value: &Value| {
        value.as_u64().and_then(|value| u32::try_from(value).ok()).or_else(|| parse(value.as_str()?))
    };
    match action["kind"].as_str() {
        Some("skbedit") => {
            let Some(written) = action.get("mark") else { return Effect::Unchanged };
            let pair = written.as_str().and_then(value_and_mask);
            let value = number(written).or(pair.map(|pair| pair.0));
            let mask = action.get("mask").map(number);
            let mask = mask.unwrap_or(Some(pair.map_or(u32::MAX, |pair| pair.1)));
            match (value, mask) {
                (Some(value), Some(mask)) => masked(value & mask, mask, bit),
                _ => Effect::Changed,
            }
        }
        Some("connmark") => Effect::Changed,
        _ => Effect::Unchanged,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const BIT: u32 = 1 << 12;

    #[test]
    fn targets_of_iptables() {
        for (target, expected) in [
            ("MARK --set-xmark 0x1000/0x1000", Effect::Set),
            ("MARK --set-xmark 0x4000/0x4000", Effect::Unchanged),
            ("MARK --set-xmark 0x4000/0x0", Effect::Unchanged),
            ("MARK --set-xmark 0x1000/0x0", Effect::Changed),
            ("MARK --set-xmark 0x0/0xffffefff", Effect::Unchanged),
            ("MARK --set-xmark 0x3/0xffffffff", Effect::Cleared),
            ("MARK --set-mark 0x1000/0x1", Effect::Set),
            ("MARK --set-mark 7", Effect::Cleared),
            ("MARK --or-mark 0x1000", Effect::Set),
            ("MARK --and-mark 0xffff", Effect::Unchanged),
            ("MARK --and-mark 0xfff", Effect::Cleared),
            ("MARK --xor-mark 0x1000", Effect::Changed),
            ("CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", Effect::Changed),
            ("CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0x80", Effect::Cleared),
            ("CONNMARK --restore-mark --mask 0x80", Effect::Unchanged),
            ("CONNMARK --restore-mark", Effect::Changed),
            ("CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff", Effect::Unchanged),
            ("CONNMARK --set-xmark 0x1000/0x1000", Effect::Unchanged),
            ("TPROXY --on-port 80 --on-ip 0.0.0.0 --tproxy-mark 0x1/0x1", Effect::Unchanged),
            ("TPROXY --on-port 80 --tproxy-mark 0x200/0xffffffff", Effect::Cleared),
            ("SET --map-set x src --map-mark", Effect::Changed),
            ("ACCEPT", Effect::Unchanged),
        ] {
            let words = format!("PREROUTING -i cali+ -j {target}").split(' ').map(str::to_owned).collect();
            assert_eq!(rule_effect(&Body::Iptables(words), BIT), expected, "{target}");
        }
    }

    #[test]
    fn statements_of_nftables() {
        let mark = json!({"meta": {"key": "mark"}});
        for (value, expected) in [
            (json!(4096), Effect::Set),
            (json!(16), Effect::Cleared),
            (json!({"|": [mark, 4096]}), Effect::Set),
            (json!({"|": [mark, 16]}), Effect::Unchanged),
            (json!({"^": [{"&": [mark, 4_294_963_199_u32]}, 8192]}), Effect::Cleared),
            (json!({"^": [{"&": [mark, 4_294_959_103_u32]}, 8192]}), Effect::Unchanged),
            (json!({"^": [mark, 4096]}), Effect::Changed),
            (json!({"ct": {"key": "mark"}}), Effect::Changed),
            (json!({"|": [{"&": [{"ct": {"key": "mark"}}, 129]}, 1]}), Effect::Cleared),
            (json!({"map": {"key": {"payload": {}}, "data": "@m"}}), Effect::Changed),
        ] {
            let statement = json!({"mangle": {"key": mark, "value": value}});
            assert_eq!(rule_effect(&Body::Nft(vec![statement]), BIT), expected, "{value}");
        }
        for other in [
            json!({"mangle": {"key": {"ct": {"key": "mark"}}, "value": 4096}}),
            json!({"match": {"op": "==", "left": mark, "right": 4096}}),
            json!({"xt": {"type": "target", "name": "MASQUERADE"}}),
        ] {
            assert_eq!(rule_effect(&Body::Nft(vec![other]), BIT), Effect::Unchanged);
        }
        let target = json!({"xt": {"type": "target", "name": "MARK"}});
        assert_eq!(rule_effect(&Body::Nft(vec![target]), BIT), Effect::Changed);
    }

    #[test]
    fn actions_of_tc() {
        for (action, expected) in [
            (json!({"kind": "skbedit", "mark": 4096}), Effect::Set),
            (json!({"kind": "skbedit", "mark": 0, "mask": "0xf000"}), Effect::Cleared),
            (json!({"kind": "skbedit", "mark": 1, "mask": 15}), Effect::Unchanged),
            (json!({"kind": "skbedit", "mark": "4096/0xf000"}), Effect::Set),
            (json!({"kind": "skbedit", "priority": ":1"}), Effect::Unchanged),
            (json!({"kind": "connmark", "zone": 0}), Effect::Changed),
            (json!({"kind": "gact"}), Effect::Unchanged),
        ] {
            assert_eq!(action_effect(&action, BIT), expected, "{action}");
        }
    }
}
