-- Keep a proof of a sealing key, or get the one that is kept.
--   $1  key id  text
--   $2  proof   text
-- `do update` changes nothing; it is there to return the row that stands.
insert into sealing_keys (id, proof)
values ($1::text, $2::text)
on conflict (id) do update set proof = sealing_keys.proof
returning proof
