-- Make a client.
--   $1 id  $2 name  $3 hash of its secret  $4 scopes  $5 projects (null: all)
-- No row comes back when the name is taken.
insert into clients (id, name, secret_hash, scopes, projects)
values ($1::uuid, $2::text, $3::text, $4::text[], $5::uuid[])
on conflict (name) do nothing
returning id as client_id, array_to_string(scopes, ' ') as scope, projects
