//! rtnetlink decoder: any bytes are decoded to their end without a panic.

use bytes::BytesMut;
use imds_agent::{
    datapath::attach::{clsact::TcFilter, qdisc::Qdisc},
    node::{link::Link, link_event::Event},
};
use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    proto::{NetlinkCodec, NetlinkMessageCodec as _},
};

pub(crate) fn run(bytes: &[u8]) {
    let mut datagram = BytesMut::from(bytes);
    // Decodes each datagram as the netlink connection does.
    while let Ok(Some(message)) = NetlinkCodec::decode::<RouteNetlinkMessage>(&mut datagram) {
        read(message);
    }
}

fn read(message: NetlinkMessage<RouteNetlinkMessage>) {
    match &message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
            let index = link.header.index;
            assert!(Link::from_message(link.clone()).is_none_or(|link| link.index == index));
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(filter)) => {
            let _filter = TcFilter::from_message(filter.clone());
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewQueueDiscipline(qdisc)) => {
            let _qdisc = Qdisc::from_message(qdisc.clone());
        }
        _ => {}
    }
    let _news = Event::from_payload(message.payload);
}
