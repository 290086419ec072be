-- A client, and what its secret is compared with: the hash, and the one before it while that is valid.
--   $1  client id  uuid
select id, scopes, secret_hash, case when previous_until > clock_timestamp() then previous_hash end as previous_hash
from clients
where id = $1::uuid
