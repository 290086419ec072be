-- Remove a client. Its locks run on until they expire.
--   $1  name  text
delete from clients
where name = $1::text
returning id as client_id, array_to_string(scopes, ' ') as scope, projects, name
