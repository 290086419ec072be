-- Whether this server takes writes: no standby, and not set to read only.
select not pg_is_in_recovery() and current_setting('transaction_read_only') = 'off'
