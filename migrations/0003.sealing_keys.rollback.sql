drop table sealing_keys;
