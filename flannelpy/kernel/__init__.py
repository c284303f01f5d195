"""The only folder that touches the machine: netlink, links, sysctls."""
