-- Forget a sealing key with which no password is sealed any more; no row comes back where one is.
--   $1  key id                          text
--   $2  how secrets sealed by it begin  text
delete from sealing_keys
where id = $1::text
    and not exists (select from users where starts_with(secret, $2::text))
returning id
