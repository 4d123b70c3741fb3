"""vmkit.packets: asks a running vsock device for packets and faults, and shows packets as text, JSON and pcap."""
