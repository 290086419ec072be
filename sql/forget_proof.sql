-- Forget a sealing key with which nothing is sealed any more; no row comes back where something is.
--   $1  key id                            text
--   $2  how passwords sealed by it begin  text
delete from sealing_keys
where id = $1::text
    and not exists (select from users where starts_with(secret, $2::text))
    and not exists (select from user_sessions where key_id = $1::text)
    and not exists (select from user_codes where key_id = $1::text)
returning id
